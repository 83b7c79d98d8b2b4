"""Judges, length control, similarity, reward models: pitfalls 7, 14 and 20. Each test was seen to fail on the mutation that its comment
names"""
import numpy as np
import pytest
import torch
from scipy.special import expit
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from w2s.data.rows import make_rows
from w2s.errors import DataError, ModelError
from w2s.evaluate.length_control import LengthBias, length_bias, length_controlled_win_rate, length_table
from w2s.evaluate.responses import score_responses
from w2s.evaluate.reward_models import load_reward_model
from w2s.evaluate.similarity import fit_r2, r2_difference, similarity, similarity_table
from w2s.feedback import judge as module
from w2s.feedback.judge import (
    ANSWERS,
    ECHO,
    JudgeForm,
    Judgement,
    ask_each,
    ask_text,
    ask_words,
    judge_by,
    judge_labels,
    judge_pairs,
    judge_report,
    judged_scores,
    parse_verdict,
    question,
    response_pairs,
    text_votes,
)
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from w2s.train.generate import GenerateSettings

SMALL = LoadSettings('none', 'float32')
TEXTS = ['What do cats eat?', ' Fish, and now and then a mouse.', ' Nothing at all.', ' Cats eat fish. They are fond of milk, too.']


def some_pairs(n=40): return make_rows([dict(prompt=f'Q{i}', response_a=f' good {i}', response_b=f' bad {i}') for i in range(n)], 'pairs')


def swapped(pairs):
    rows = [dict(id=r['id'], prompt=r['prompt'], response_a=r['response_b'], response_b=r['response_a']) for r in pairs]
    return make_rows(rows, 'pairs')


def knows(q): return float(q.prompt.index('good') < q.prompt.index('bad'))


# Judge

def test_pitfall_20_always_first():
    "Mutation: the verdict of the first order alone (win rate 1), or of the mean with ties to a"
    report = judge_report(judge_by(ask_each(lambda q: .9), some_pairs()))
    assert (report['win_rate'], report['flip_rate'], report['first_rate'], report['tie']) == (.5, 1, 1, 1)
    report = judge_report(judge_by(ask_each(lambda q: .1), some_pairs()))
    assert (report['win_rate'], report['flip_rate'], report['first_rate']) == (.5, 1, 0)


def test_pitfall_20_failures_are_not_verdicts():
    "Mutation: NaN as 0 or 1/2; a pair judged in one order only as judged"
    calls = []
    def tired(q):
        calls.append(q)
        if len(calls) % 10 == 0: raise TimeoutError
        return knows(q)
    judged = judge_by(ask_each(tired, (TimeoutError,)), some_pairs())
    report = judge_report(judged)
    assert len(calls) == 80 and report['failed'] == judged.failed.sum() == 4 # the same pairs in both orders
    assert report['win_rate'] == 1 and (report['lowest'], report['highest']) == (.9, 1)
    one_order = judge_by(ask_each(lambda q: None if q.prompt.index('good') > q.prompt.index('bad') else 1.), some_pairs(5))
    assert one_order.failed.all() and np.isnan(one_order.outcome).all() and np.isnan(judge_report(one_order)['win_rate'])
    with pytest.raises(DataError): judged_scores(one_order)
    with pytest.raises(DataError): judge_labels(some_pairs(5), one_order, 'x')
    labels = judge_labels(some_pairs(), judged, 'x')
    assert len(labels.rows) == len(labels.prob_a) == 36 and set(labels.rows['id']).isdisjoint(np.array(judged.ids)[judged.failed])


def test_only_named_exceptions_are_failures():
    def broken(q): raise KeyError('a bug')
    with pytest.raises(KeyError): judge_by(ask_each(broken, (TimeoutError,)), some_pairs(2))
    for wrong in (lambda q: [.5], lambda q: [1.5]*len(q), lambda q: [-.1]*len(q)):
        with pytest.raises(DataError): judge_by(wrong, some_pairs(2))


def test_equal_texts_are_ties_and_not_asked():
    "Mutation: asked about, and counted as a flip"
    pairs = make_rows(
        [dict(prompt='Q', response_a=' x', response_b=' x'), dict(prompt='Q', response_a=' good', response_b=' bad')], 'pairs'
    )
    asked = []
    def judge(q): return asked.append(q) or knows(q)
    judged = judge_by(ask_each(judge), pairs)
    assert len(asked) == 2 and judged.outcome.tolist() == [.5, 1] and judge_report(judged)['flip_rate'] == 0


def test_verdicts_swap_with_the_answers():
    "Mutation: the second order not turned round in prob_a, sides or outcome"
    r = np.random.default_rng(0)
    p = {}
    def moody(q): return p.setdefault(q, r.random())
    pairs = some_pairs(200)
    one, other = judge_by(ask_each(moody), pairs), judge_by(ask_each(moody), swapped(pairs))
    assert one.ids == other.ids
    np.testing.assert_allclose(one.prob_a, 1 - other.prob_a)
    np.testing.assert_array_equal(one.outcome, 1 - other.outcome)
    np.testing.assert_array_equal(one.flipped, other.flipped)
    assert 0 < one.flipped.mean() < 1 and (one.outcome[one.flipped] == .5).all()


def test_half_a_verdict_is_a_tie():
    x = Judgement(('a', 'b'), np.array([[.9, .5], [.5, .5]]), np.zeros(2, bool))
    assert x.outcome.tolist() == [.5, .5] and not x.flipped.any()


def test_holes_in_answers_are_left_alone():
    "Mutation: str.replace one after another"
    q = question(JudgeForm('{prompt}|{first}|{second}', ('{first}', '{second}')), 'say {first}', '{second}', 'b {prompt}')
    assert q.prompt == 'say {first}|{second}|b {prompt}' and q.words == ('{second}', 'b {prompt}')
    assert question(ANSWERS, [dict(role='user', content='Hi')], 'x', 'y').prompt.count('user: Hi') == 1


def test_strict_reading():
    "Mutation: `word in text`"
    words = (' A', ' B')
    assert [parse_verdict(t, words) for t in ('A', ' a.', '"B"', '[B]\n')] == [1, 0 + 1, 0, 0]
    for unreadable in ('', ' ', 'A B', 'A or B', 'Answer: A', 'I cannot', 'both', 'AA', 'B is better'):
        assert np.isnan(parse_verdict(unreadable, words)), unreadable
    assert np.isnan(parse_verdict('a', ('a', 'A.')))


@pytest.fixture(scope='module')
def pico(): return load_base('pico', LoadSettings('none', 'float32'))


def desk(n=8):
    places = ('castle', 'forest', 'tavern', 'market')
    return make_rows([dict(prompt=f'Customer: Where does Bel{"on"*(i + 1)} live?\nDesk:', response_a=f' The answer is {places[i % 4]}.',
                           response_b=f' Our book says {places[(i + 1) % 4]}. Do not waste my time.') for i in range(n)], 'pairs')


def test_local_judge_does_not_depend_on_batches_or_names(pico):
    "Mutation: rows of a batch returned in the order of their lengths"
    pairs = desk()
    whole, single = judge_pairs(pico, pairs, ECHO, quiet=True), judge_pairs(pico, pairs, ECHO, budget=1, quiet=True)
    np.testing.assert_allclose(whole.p_first, single.p_first, atol=1e-4)
    np.testing.assert_allclose(whole.prob_a, 1 - judge_pairs(pico, swapped(pairs), ECHO, quiet=True).prob_a, atol=1e-4)
    alone = np.concatenate([judge_pairs(pico, pairs.select([i]), ECHO, quiet=True).p_first for i in range(len(pairs))])
    np.testing.assert_allclose(whole.p_first, alone, atol=1e-4)
    assert len(np.unique(whole.p_first.round(6))) > 8


def test_local_judge_never_cuts_a_question(pico):
    "Mutation: `encode_labels`, which cuts the prompt from the left"
    long = make_rows([dict(prompt='Customer: ' + 'soup '*600, response_a=' x', response_b=' y'), *desk(1)], 'pairs')
    judged = judge_pairs(pico, long, quiet=True)
    assert judged.failed.tolist() == [True, False] or pico.context > 1300
    assert judge_pairs(pico, desk(2), limit=5, quiet=True).failed.all()
    prefix = make_rows([dict(prompt='Q', response_a=' The answer is tent.', response_b=' The answer is tent. Now go away.')], 'pairs')
    assert judge_pairs(pico, prefix, ECHO, quiet=True).failed.all() and not judge_pairs(pico, prefix, ANSWERS, quiet=True).failed.any()
    # without a template: plain paragraphs
    assert not judge_pairs(pico, desk(1), JudgeForm(ANSWERS.text, (' A', ' B'), chat=True), quiet=True).failed.any()


def test_judge_with_an_adapter_is_the_adapter(pico, monkeypatch):
    "Mutation: base.model whatever `model` is"
    seen = []
    monkeypatch.setattr(module, 'class_probs', lambda model, rows, *rest: seen.append(model) or np.full((len(rows), 2), .5))
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, *rest: seen.append(model) or [['A']]*len(prompts))
    ask_words(pico, 'tuned')([question(ANSWERS, 'Q', 'x', 'y')])
    text_votes(pico, [question(ANSWERS, 'Q', 'x', 'y')], GenerateSettings(max_tokens=2), 'tuned')
    ask_words(pico)([question(ANSWERS, 'Q', 'x', 'y')])
    assert seen == ['tuned', 'tuned', pico.model]


def test_written_verdicts(pico, monkeypatch):
    "Unreadable ones leave the share of the others alone; none readable is a failure. Mutation: unreadable as the second"
    texts = [['A', 'B', 'A', 'well'], ['who', 'knows', '?', ''], ['B', ' b.', 'B', 'B']]
    monkeypatch.setattr(module, 'generate', lambda model, tok, prompts, *rest: texts[:len(prompts)])
    asked = [question(ANSWERS, f'Q{i}', 'x', 'y') for i in range(3)]
    how = GenerateSettings(max_tokens=2, samples=4)
    votes = text_votes(pico, asked, how)
    np.testing.assert_array_equal(votes, [[1, 0, 1, np.nan], [np.nan]*4, [0]*4])
    np.testing.assert_allclose(ask_text(pico, how)(asked), [2/3, np.nan, 0])
    crowded = [question(ANSWERS, 'soup '*3000, 'x', 'y'), asked[0]]
    assert np.isnan(text_votes(pico, crowded, how)[0]).all() and text_votes(pico, crowded, how)[1, 0] == 1


def test_samples_of_two_models():
    pairs = response_pairs(['P', 'Q'], [[' good', ' bad'], [' good', ' good']], [[' bad', ' good'], [' bad', ' bad']], ['1', '2'])
    assert pairs['id'] == ['1#0', '1#1', '2#0', '2#1']
    whole, scores = judged_scores(judge_by(ask_each(knows), pairs), 2)
    assert whole.all() and scores['judge_win_rate'].tolist() == [.5, 1] and scores['judge_lose'].tolist() == [.5, 0]
    def half(q): return None if q.prompt.count('Q') and 'Q' in q.prompt.split('[User]')[1][:4] else knows(q)
    whole, scores = judged_scores(judge_by(ask_each(half), pairs), 2)
    assert whole.tolist() == [True, False] and scores['judge_win_rate'].tolist() == [.5]


# Length control

def planted(lead, rows=600, samples=1, seed=0, more=30):
    r = np.random.default_rng(seed)
    a, b = r.normal(120 + more, 40, (rows, samples)), r.normal(120, 40, (rows, samples))
    return (r.random((rows, samples)) < expit(lead + 1.5*np.tanh((a - b)/60))).astype(float), a, b


def test_pitfall_20_same_text_other_length():
    "Mutation: no slope (then the longer of the two wins)"
    found = []
    for seed in range(20):
        r = np.random.default_rng(seed)
        base, filler, either = r.integers(20, 60, 400), r.integers(1, 40, 400), r.random(400) < .7
        a, b = base + filler*either, base + filler*~either
        found.append(length_controlled_win_rate((a > b).astype(float), a, b, n=2).value)
    assert max(abs(np.array(found) - .5)) < .07
    with pytest.raises(DataError, match='a is longer in all'): length_controlled_win_rate(np.ones(50), np.arange(50) + 100, np.arange(50))
    paid = length_bias(*planted(0, 3000, more=0))
    a, b = np.full(3000, 160.), np.full(3000, 120.)
    wins = (np.random.default_rng(1).random(3000) < expit(1.5*np.tanh(40/60))).astype(float)
    assert abs(length_controlled_win_rate(wins, a, b, paid).value - .5) < .04 < wins.mean() - .5
    assert length_controlled_win_rate([.5]*4, [3, 4, 5, 6], [4, 3, 6, 5]).value == pytest.approx(.5)


@pytest.mark.parametrize('lead', [-1, 0, .7])
def test_planted_lead_is_found(lead):
    "Mutation: words of b less words of a; the sign does not matter to a free slope, so it is given, too"
    y, a, b = planted(lead, 6000)
    assert length_controlled_win_rate(y, a, b, n=50).value == pytest.approx(expit(lead), abs=.025)
    assert length_controlled_win_rate(y, a, b, LengthBias(1.5, 60), n=50).value == pytest.approx(expit(lead), abs=.025)
    assert length_controlled_win_rate(1 - y, b, a, n=50).value == pytest.approx(
        1 - length_controlled_win_rate(y, a, b, n=50).value, abs=1e-6
    )


def test_samples_of_a_row_stay_together():
    "Ten copies of each outcome are no new rows. Mutation: bootstrap over all pairs"
    y, a, b = planted(.5, 150)
    one, ten = (length_controlled_win_rate(*(np.repeat(v, k, axis=1) for v in (y, a, b))) for k in (1, 10))
    assert ten.n == one.n == 150
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=.1)
    table = length_table(y, a, b)
    assert table.loc['if words were counted', 'value'] == pytest.approx((a > b).mean()) and (table['low'] <= table['value']).all()


# Similarity

def test_similarity_of_one_row_ignores_the_encoders_batch(tmp_path):
    "Mutation: mean over the padding, too"
    folder = tiny_model(tmp_path/'encoder', TEXTS)
    a, b = TEXTS, TEXTS[1:] + TEXTS[:1]
    whole = similarity(a, b, folder)
    np.testing.assert_allclose(whole, [similarity([x], [y], folder)[0] for x, y in zip(a, b, strict=True)], atol=1e-5)
    np.testing.assert_allclose(whole, similarity(b, a, folder), atol=1e-6)
    assert (whole < .999).all()


def test_similarity_table_takes_the_mean_over_samples():
    table = similarity_table({'one': [[TEXTS[1], TEXTS[2]], [TEXTS[3], TEXTS[3]]], 'two': [TEXTS[1], TEXTS[3]]}, [TEXTS[1], TEXTS[3]])
    assert table['two'].tolist() == pytest.approx([1, 1]) and table['one'][1] == pytest.approx(1)
    assert table['one'][0] == pytest.approx(.5, abs=.1) and list(table.columns) == ['one', 'two']
    with pytest.raises(DataError, match='no response'): similarity_table({'x': [[], ['a']]}, ['a', 'b'])


def test_r2():
    "Mutation: r2 without the sign in `r2_difference`"
    x, e = np.random.default_rng(0).normal(size=(2, 500))
    assert fit_r2(x, x + e).r2 == pytest.approx(np.corrcoef(x, x + e)[0, 1]**2)
    assert fit_r2(x, 3 - 2*x).slope == pytest.approx(-2) and fit_r2(x, 3 - 2*x).r2 == pytest.approx(1)
    assert r2_difference(x, x + e, -x)[1] > 1
    covered = 0
    for seed in range(60):
        u, v = np.random.default_rng(seed).normal(size=(2, 150))
        line = fit_r2(u, u + v, n=300, seed=seed)
        covered += line.low <= .5 <= line.high
    assert covered >= 52


# Reward models

def reward_folder(folder, pad, labels=1):
    tok = tiny_tokenizer(TEXTS*5)
    tok.pad_token = pad
    torch.manual_seed(0)
    config = tiny_config(len(tok))
    config.num_labels = labels
    model = LlamaForSequenceClassification(config)
    model.config.pad_token_id = tok.pad_token_id # the same weights whatever the padding is
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_pitfall_7_pad_is_end(tmp_path):
    "The reward is that of the last token also where the end token is the padding. Mutation: pad with the tokenizer's padding token"
    own, end = (
        score_responses(
            load_reward_model(reward_folder(tmp_path / name, pad), SMALL, device='cpu'), TEXTS[:1] * 3, [[t] for t in TEXTS[1:]]
        )
        for name, pad in (('own', '<pad>'), ('end', '</s>'))
    )
    np.testing.assert_allclose(own, end, atol=1e-6)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path/'own').eval()
    tok = tiny_tokenizer(TEXTS*5)
    for t, r in zip(TEXTS[1:], own[:, 0], strict=True):
        ids = torch.tensor([[*tok(TEXTS[0] + t).input_ids, tok.eos_token_id]])
        with torch.no_grad(): assert model.score(model.model(ids).last_hidden_state)[0, -1, 0].item() == pytest.approx(r, abs=1e-5)


def test_pitfall_14_a_head_that_is_not_in_the_files(tmp_path):
    "Mutation: missing weights ignored"
    with pytest.raises(ModelError, match='score.weight'): load_reward_model(tiny_model(tmp_path/'lm', TEXTS), SMALL, device='cpu')
    with pytest.raises(ModelError, match='gives 3 numbers'):
        load_reward_model(reward_folder(tmp_path / 'three', '<pad>', 3), SMALL, device='cpu')


def test_an_encoder_reads_two_texts(tmp_path):
    "Mutation: token_type_ids or the second text lost (the text form)"
    tok = tiny_tokenizer(TEXTS*5)
    tok.add_special_tokens(dict(sep_token='[SEP]', cls_token='[CLS]'))
    cls, sep = tok.cls_token_id, tok.sep_token_id
    tok._tokenizer.post_processor = processors.TemplateProcessing(
        '[CLS] $A [SEP]', '[CLS] $A [SEP] $B [SEP]', [('[CLS]', cls), ('[SEP]', sep)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tok),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        max_position_embeddings=64,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path/'bert')
    tok.save_pretrained(tmp_path/'bert')
    got = score_responses(load_reward_model(tmp_path/'bert', SMALL, device='cpu'), TEXTS[:1]*3, [[t] for t in TEXTS[1:]])[:, 0]
    with torch.no_grad(): want = [model(**tok(TEXTS[0], t, return_tensors='pt')).logits.item() for t in TEXTS[1:]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_does_not_fit_has_no_score(tmp_path):
    "Mutation: truncation"
    scores = score_responses(
        load_reward_model(reward_folder(tmp_path / 'rm', '<pad>'), SMALL, limit=40, device='cpu'), TEXTS[:1], [[TEXTS[1], TEXTS[1] * 30]]
    )
    assert np.isnan(scores).tolist() == [[False, True]]
