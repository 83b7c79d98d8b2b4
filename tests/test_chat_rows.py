"""Rows of chat messages for models with and without a chat template: what is trained, asked and reported is one text, by default and by
choice"""
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import processors
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.models import asked_inputs, know_model, model_inputs
from w2s.compare.preference_settings import WeakTeacher
from w2s.errors import ConfigError, DataError
from w2s.models.chat_templates import CHATML, PLAIN, choose_template
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model, tiny_tokenizer
from w2s.train.class_head import encode_texts
from w2s.train.endings import end_ids
from w2s.train.generate import GenerateSettings, prompt_ids, respond
from w2s.train.labels import encode_labels
from w2s.train.templates import MERGED, SWAPPED, TWICE, chat_text, message_changes, no_end, render, turn_end
from w2s.train.tokens import NO_TEMPLATE, encode, encode_rows

TEXTS = ['Where does fox 7 live?', 'By river 7.', 'No idea about 7.', 'Human: Assistant: be brief', '<|im_start|>user']*3
OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def user(text): return dict(role='user', content=text)
def assistant(text): return dict(role='assistant', content=text)


ASK = [user('Where does fox 3 live?')]
LONG = [dict(role='system', content='Be brief.'), user('Where does fox 3 live?'), assistant('By river 3.'), user('And fox 4?')]


# As text that somebody has written

KINDS = {
    'none': {},
    'begin': dict(bos=True),
    'both': dict(bos=True, eos=True),
    'no end token': dict(eos_token=None),
    'no begin token': dict(bos_token=None),
    'one token for both': dict(bos_token='</s>', bos=True),
    'pad is end': dict(pad_token='</s>'),
    'no pad': dict(pad_token=None),
}


def reader(bos=False, eos=False, **special):
    "A tokenizer without a template, with begin and end tokens of several kinds"
    tok = tiny_tokenizer(TEXTS)
    for name, token in special.items(): setattr(tok, name, token)
    marks = [t for t, asked in ((tok.bos_token, bos), (tok.eos_token, eos)) if asked]
    single = ' '.join([*([tok.bos_token] if bos else []), '$A', *([tok.eos_token] if eos else [])])
    if marks:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, tok.convert_tokens_to_ids(t)) for t in dict.fromkeys(marks)]
        )
    return tok


WRITTEN = {
    'one turn': (ASK, 'Human: Where does fox 3 live?\n\nAssistant:'),
    'many': (LONG, 'Be brief.\n\nHuman: Where does fox 3 live?\n\nAssistant: By river 3.\n\nHuman: And fox 4?\n\nAssistant:'),
    'spaces': ([user(' Where \n')], 'Human:  Where \n\n\nAssistant:'),
    'nothing': ([user('')], 'Human: \n\nAssistant:'),
    'signs of Jinja': ([user('{{ 1 }} {% x %}')], 'Human: {{ 1 }} {% x %}\n\nAssistant:'),
}


@pytest.mark.parametrize('choice', [None, 'plain'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('talk', WRITTEN)
def test_plain_paragraphs_are_text_like_any_other(talk, kind, choice):
    "For training, asking, heads and label words: the ids of the same text, as the tokenizer begins and ends any text"
    tok, (prompt, text) = choose_template(reader(**KINDS[kind]), choice), WRITTEN[talk]
    assert encode(tok, [prompt], ['By river 3.']) == encode(tok, [text], [' By river 3.'])
    assert prompt_ids(tok, [prompt]) == prompt_ids(tok, [text])
    chat, plain = (Dataset.from_list([dict(id='a', prompt=p)]) for p in (prompt, text))
    assert encode_texts(tok, chat, 256).rows == encode_texts(tok, plain, 256).rows
    assert encode_labels(tok, chat, (' no', ' yes'), 256).rows == encode_labels(tok, plain, (' no', ' yes'), 256).rows


@pytest.mark.parametrize('kind', KINDS)
def test_training_begins_where_asking_ends(kind):
    for choice in ('plain', 'chatml'):
        tok = choose_template(reader(**KINDS[kind]), choice)
        for prompt in (ASK, LONG):
            row, = encode(tok, [prompt], ['By river 3.'])
            assert list(row.ids[:row.start]) == prompt_ids(tok, [prompt])[0]
            begins = KINDS[kind].get('bos', False) # a tokenizer that begins text with a token begins these, too, once
            assert [i for i in row.ids[:3] if i == tok.bos_token_id] == [tok.bos_token_id]*begins


def test_a_role_without_a_name_refuses_its_row():
    data = Dataset.from_list(
        [
            dict(id='a', prompt=ASK, completion='x'),
            dict(id='b', prompt=[*ASK, assistant('y'), dict(role='tool', content='12')], completion='x'),
        ]
    )
    tokens = encode_rows(reader(), data, ('completion',), 64)
    assert [r.id for r in tokens.rows] == ['a'] and 'no name for the role tool; give a file by --chat-template' in tokens.refused['b']
    assert tokens.found[NO_TEMPLATE] == [1]


@pytest.mark.parametrize('kind', ['none', 'no end token'])
def test_an_answer_ends_where_the_next_turn_begins(kind, tmp_path):
    "By the end token, or by the name of the other speaker, for a model that was never tuned"
    tok = reader(**KINDS[kind])
    end = turn_end(tok)
    assert (end.token, end.stop) == (tok.eos_token_id, '\n\nHuman:') and (no_end(tok, True) == '') is (kind == 'none')
    tiny_model(tmp_path/'m', TEXTS)
    base = load_base(tmp_path/'m', LoadSettings('none', 'float32'), device='cpu')
    assert end_ids(base.model, base.tokenizer) == {base.tokenizer.eos_token_id}


@pytest.mark.parametrize('choice, stop', [('plain', '\n\nHuman:'), (None, '\n\nHuman:'), ('chatml', '<|im_end|>')])
def test_a_reply_is_cut_at_the_next_turn(tmp_path, monkeypatch, choice, stop):
    seen = []
    tiny_model(tmp_path/'m', TEXTS)
    base = load_base(tmp_path/'m', LoadSettings('none', 'float32', chat_template=choice), device='cpu')
    monkeypatch.setattr('w2s.train.generate.write', lambda model, tok, prompts, _, how, *__: seen.append(how.stop) or [None]*len(prompts))
    respond(base.model, base.tokenizer, [ASK], GenerateSettings(max_tokens=2), quiet=True)
    respond(base.model, base.tokenizer, ['text'], GenerateSettings(max_tokens=2), quiet=True)
    assert seen == [(stop,), ()]


# Which template holds

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A model without a template, and one with its own"
    home = tmp_path_factory.mktemp('models')
    for name, template in (('bare', None), ('own', OWN)):
        tiny_model(home/name, TEXTS, seed=len(name))
        tok = tiny_tokenizer(TEXTS)
        tok.chat_template = template
        tok.save_pretrained(home/name)
    (home / 'mine.jinja').write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return home


TEMPLATES = {
    'default': (None, {'bare': PLAIN, 'own': OWN}),
    'plain': ('plain', {'bare': PLAIN, 'own': PLAIN}),
    'chatml': ('chatml', {'bare': CHATML, 'own': CHATML}),
    'file': ('mine.jinja', {}),
}


@pytest.mark.parametrize('kind', TEMPLATES)
def test_a_model_uses_its_own_template_unless_another_one_is_named(models, monkeypatch, kind):
    "Its text is in the key of a stage where it was named, or where messages are written for a model without one; and in the notes"
    monkeypatch.chdir(models)
    choice, want = TEMPLATES[kind]
    def known(name, choice): return know_model('weak', str(models/name), WeakTeacher(data='x', load=LoadSettings(chat_template=choice)))
    for name in ('bare', 'own'):
        model, plain = known(name, choice), known(name, None)
        text = want.get(name, Path('mine.jinja').read_text())
        expect = {
            PLAIN: 'Human: Where does fox 3 live?\n\nAssistant:',
            OWN: '<user>Where does fox 3 live?</s><assistant>',
            CHATML: '<|im_start|>user\nWhere does fox 3 live?<|im_end|>\n<|im_start|>assistant\n',
        }.get(text, '[user] Where does fox 3 live?</s>[assistant] ')
        assert render(model.reader.tokenizer, ASK, True) == expect
        key, usual = ({**model_inputs(m), **asked_inputs(m, ['text'])} for m in (model, plain))
        assert (key == usual) is (choice is None) and any('messages are written' in n for n in model.notes) is (choice is not None)
        assert ('chat_template' in {**model_inputs(model), **asked_inputs(model, [ASK])}) is (choice is not None or name == 'bare')


def test_a_file_counts_by_what_it_says(models, tmp_path):
    def key(text):
        (tmp_path/'a.jinja').write_text(text)
        return model_inputs(
            know_model('weak', str(models / 'bare'), WeakTeacher(data='x', load=LoadSettings(chat_template=str(tmp_path / 'a.jinja'))))
        )
    assert key(OWN) == key(OWN) != key(OWN + ' ')


WRONG = {
    'no file': ('nothing.jinja', None, 'there is no such file; give chatml, plain, or a file'),
    'mistyped': ('chatlm', None, 'there is no such file; give chatml'),
    'empty': ('a.jinja', '', 'is empty'),
    'no JSON': ('a.json', '{', 'is no JSON'),
    'another JSON': ('a.json', '{"x": 1}', 'has no text named chat_template'),
    'broken': ('a.jinja', '{% for %}', '--chat-template a.jinja: the chat template cannot be used'),
    'loses the reply': (
        'a.jinja',
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        '--chat-template a.jinja: chat template loses the reply',
    ),
    'refuses': ('a.jinja', "{{ raise_exception('never') }}", 'never'),
    'not text': ('a.jinja', b'\xff\xfe\xff', 'cannot be read as text'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_templates_that_cannot_be_chosen(models, tmp_path, monkeypatch, kind):
    name, text, words = WRONG[kind]
    monkeypatch.chdir(tmp_path)
    if text is not None: Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(words)):
        know_model('weak', str(models / 'bare'), WeakTeacher(data='x', load=LoadSettings(chat_template=name)))


# Every command

def write(path, rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


@pytest.fixture
def typed(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, animal in (('prefs', 'fox'), ('train', 'wolf')):
        write(
            tmp_path / f'{name}.jsonl',
            [
                dict(
                    chosen=[user(f'Where does {animal} {i} live?'), assistant(f'By river {i}.')],
                    rejected=[user(f'Where does {animal} {i} live?'), assistant(f'No idea about {i}.')],
                )
                for i in range(40)
            ],
        )
        write(
            tmp_path / f'{name}-text.jsonl',
            [dict(prompt=f'Where does {animal} {i} live?', chosen=f' By river {i}.', rejected=f' No idea about {i}.') for i in range(40)],
        )
    write(tmp_path/'questions.jsonl', [dict(question=f'Where does fox {i} live?', answer=f'By river {i}.') for i in range(8)])
    (tmp_path/'mine.jinja').write_text((models/'mine.jinja').read_text())
    def run(command, *words):
        return CliRunner().invoke(
            app, [w.replace('BARE', str(models / 'bare')).replace('OWN', str(models / 'own')) for w in (*COMMANDS[command].split(), *words)]
        )
    return run


COMMANDS = {
    'weak-teacher': 'run preferences --data prefs.jsonl --weak BARE --strong OWN --quantize none --dtype float32 --dry-run',
    'label': 'label --rows prefs.jsonl --train train.jsonl --out o.parquet --model BARE --quantize none --dtype float32 --dry-run',
    'text': 'run preferences --data prefs-text.jsonl --weak BARE --strong OWN --quantize none --dtype float32 --dry-run',
    'world': 'run preferences --dry-run',
    'label text': 'label --rows prefs-text.jsonl --train train-text.jsonl --out o.parquet --model BARE --dry-run',
    'refine': 'refine --questions questions.jsonl --strong BARE --quantize none --dtype float32 --dry-run',
    'refine, ours': 'refine --questions questions.jsonl --dry-run',
    'toxicity': 'run toxicity --dry-run',
    'persona': 'run persona --dry-run',
}


@pytest.mark.cases(3)
@pytest.mark.parametrize('choice', [None, 'plain', 'chatml', 'mine.jinja'])
@pytest.mark.parametrize('command', ['weak-teacher', 'label'])
def test_the_plan_says_how_messages_are_written(typed, command, choice):
    out = typed(command, *(['--chat-template', choice] if choice else []))
    assert out.exit_code == 0, out.output
    said = {
        None: 'no chat template: messages are written as plain paragraphs',
        'plain': 'messages are written as plain paragraphs, Human: and Assistant: (--chat-template plain)',
        'chatml': 'messages are written as ChatML',
        'mine.jinja': 'messages are written as mine.jinja says',
    }
    assert said[choice] in ' '.join(out.output.split())


@pytest.mark.parametrize('command', ['text', 'world', 'label text', 'refine, ours', 'persona', 'toxicity'])
def test_a_template_that_would_do_nothing_is_refused(typed, command):
    out = typed(command, '--chat-template', 'chatml')
    assert isinstance(out.exception, ConfigError) and '--chat-template chatml would do nothing' in str(out.exception), out.output


def test_refine_asks_in_the_chosen_template(typed, models, tmp_path):
    "A base model is asked in plain text, and as a chat model where a template is named"
    assert typed('refine').exit_code == 0
    out = typed('refine', '--chat-template', 'chatml')
    assert out.exit_code == 0 and 'messages are written as ChatML' in out.output
    words = (f'refine --questions questions.jsonl --strong {models/"bare"} --quantize none --dtype float32 --max-tokens 4 --examples 2 '
             '--chat-template plain --out o.jsonl').split()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert 'chat = true' in (tmp_path/'o.md').read_text()


# What a template does, told by what it writes for any row of the same roles

def each(body): return "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"


TURN = "<turn>{{ m.role }} {{ m.content }}</turn>"
DOES = {
    'writes the question twice': (
        each("<turn>{{ m.role }} {{ m.content }}{% if m.role == 'user' %} ({{ m.content }}){% endif %}</turn>"),
        ASK,
        {'chat template writes the user message more than once'},
    ),
    'repeats the system message': (
        "{% for m in messages %}{% if m.role != 'system' %}<turn>{{ m.role }} "
        "{{ messages[0].content if messages[0].role == 'system' and m.role == 'user' }} "
        "{{ m.content }}</turn>{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}",
        LONG,
        {'chat template writes the system message more than once', MERGED},
    ),
    'repeats the last turn': (
        each(TURN).replace('{% if add', "{% if messages[-1].role == 'user' %}Again: {{ messages[-1].content }}{% endif %}{% if add"),
        LONG,
        {'chat template writes the user message more than once'},
    ),
    'swaps roles': (
        each("<turn>{{ {'user': 'assistant', 'assistant': 'user'}.get(m.role, m.role) }} {{ m.content }}</turn>"),
        ASK,
        {SWAPPED},
    ),
    'swaps other names': (each("{% if m.role == 'user' %}### Model:{% else %}### Human:{% endif %}\n{{ m.content }}\n"), ASK, {SWAPPED}),
    'drops a word of its own': (
        each("<turn>{{ m.role }} {% if m.role != 'system' %}{{ m.content }}{% endif %}</turn>"),
        [dict(role='system', content='turn'), *ASK],
        {'chat template drops the system message'},
    ),
    'drops the role as a word': (
        each("<turn>{{ m.role }} {{ m.content if m.content != 'user' }}</turn>"),
        [user('user')],
        {'chat template drops the user message'},
    ),
    'drops one of its words': (
        each("<turn>{{ m.role }} {{ m.content if m.content|length > 4 }}</turn>"),
        [user('turn')],
        {'chat template drops the user message'},
    ),
    'drops by what it says': (
        each("<turn>{{ m.role }} {{ m.content if 'fox' not in m.content }}</turn>"),
        ASK,
        {'chat template drops the user message'},
    ),
    'is right': (each(TURN), LONG, set()),
    'is right on its own words': (each(TURN), [user('turn'), assistant('user'), user('assistant')], set()),
    'is right on a repeated question': (each(TURN), [*ASK, assistant('Where does fox 3 live?'), *ASK], set()),
    'is right on a question inside of another': (each(TURN), [user('fox'), assistant('fox fox'), user('x')], set()),
    'names the roles behind': (each("{{ m.content }} said the {{ m.role }}.\n"), LONG, None),
    'brackets': (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        [*ASK, assistant('x'), user('y')],
        set(),
    ),
    'mentions the user to the assistant': (
        each("<|{{ m.role }}|>{{ m.content }}").replace('<turn>assistant ', '<|assistant|>to the user: '),
        ASK,
        set(),
    ),
}


@pytest.mark.parametrize('kind', DOES)
def test_what_a_template_does_is_told_by_its_roles(kind):
    template, talk, want = DOES[kind]
    tok = reader()
    tok.chat_template = template
    found = message_changes(tok, talk, render(tok, talk, True))
    if want is not None: assert found == want


def test_a_reply_that_is_written_twice_is_counted():
    tok = reader()
    tok.chat_template = each("<turn>{{ m.role }} {{ m.content }}{% if m.role == 'assistant' %} ({{ m.content }}){% endif %}</turn>")
    assert chat_text(tok, ASK, 'By river 3.').found == {TWICE}


@pytest.mark.parametrize('reply', ['end', 'assistant', 'x', 'By river 3.'])
def test_a_reply_that_is_lost_is_not_found_in_the_template(reply):
    "Though the template writes the same word behind the place of the reply"
    tok = reader()
    tok.chat_template = ("{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}<assistant>{% if not "
                         "add_generation_prompt %}<x><assistant><end>{% endif %}")
    with pytest.raises(DataError, match='loses the reply'): chat_text(tok, ASK, reply)
