"Transfer by demonstrations: who sees whose answers, what may not leak, what a failing judge does"
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from w2s.compare.arms import Arm
from w2s.compare.demonstration_arms import arm_items, make_seed, score_arm
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.demonstration_stages import Context, answer_between, join_answers, make_training_rows, make_weak, train_sft, weak_arm
from w2s.compare.demonstration_tasks import WORLD_MAKERS, world_rows
from w2s.compare.learn import Study
from w2s.compare.models import know_model
from w2s.compare.stages import Run
from w2s.experiments.demonstrations import run
from w2s.feedback.forms import WORLD
from w2s.feedback.refine import Examples, in_context_refine, shown_rows
from w2s.models.adapters import adapter_hash
from w2s.models.zoo import SCHOLAR, card, model_folder
from w2s.train.generate import GenerateSettings

warnings.filterwarnings('ignore', category=FutureWarning)
LITTLE = dict(
    weak='pico', strong='nano', seeds=1, n_labelled=8, n_unlabelled=8, n_test=6, demonstrate=dict(epochs=1), student=dict(epochs=1)
)


def site(folder: Path, **given) -> tuple[dict, Context]:
    c = fill_demonstrations({**LITTLE, **given})
    models = {n: know_model(n, str(model_folder(n)), c) for n in ('pico', 'nano')}
    study = Study(c, Run(folder, lambda line: None), True)
    return models, Context(study, world_rows(c.task, 0, (8, 8, 6)), models['nano'], WORLD, GenerateSettings(16, 0., stop=('\n',)))


# A row never sees its own answer

@pytest.mark.parametrize('choice', ['others', 'batch'])
def test_no_row_is_shown_an_answer_of_its_group(choice):
    for seed in range(60):
        rng = random.Random(seed)
        groups = [f'g{rng.randrange(9)}' for _ in range(24)]
        answers = [rng.choice(['', 'x', 'y']) if rng.random() < .2 else f'answer {i}' for i in range(24)]
        for row, shown in enumerate(shown_rows(Examples(3, choice, seed), answers, groups)):
            assert row not in shown and all(groups[i] != groups[row] and answers[i] for i in shown)
            assert len(set(shown)) == len(shown) and (choice == 'batch' or len(shown) == 3)


def test_the_own_answer_is_not_in_the_prompt():
    "Seen from outside: the text of a row's own weak answer, and of all others of its group, stands in no prompt of that row"
    questions = [f'What is thing {i // 2}?' for i in range(20)] # each asked twice
    answers = [f'secret {i}' for i in range(20)]
    got = in_context_refine(lambda prompts: [['ok'] for _ in prompts], WORLD, questions, answers, Examples(4))
    for i, p in enumerate(got.prompts):
        own = {answers[j] for j in range(20) if questions[j] == questions[i]}
        assert not any(f'A: {a}\n' in p + '\n' for a in own)
        assert sum(f'A: {a}\n' in p + '\n' for a in answers) == 4


def test_models_in_between_answer_what_they_did_not_learn(tmp_path, monkeypatch):
    from w2s.compare import demonstration_stages as transfer_stages
    models, s = site(tmp_path)
    taught: list[set[str]] = []
    asked: list[set[str]] = []
    monkeypatch.setattr(
        transfer_stages, 'train_sft', lambda site, model, name, rows, settings, start=None: taught.append(set(rows['prompt']))
    )
    monkeypatch.setattr(
        transfer_stages,
        'make_speaker',
        lambda site, model, name, adapter, settings=None, like=None: (
            lambda prompts: (asked.append(set(prompts)), [['x'] for _ in prompts])[1]
        ),
    )
    weak = weak_arm(s, 'pico', [[f'a{i}' for i in range(8)]], models['pico'])
    assert answer_between(s, models['pico'], weak) == ['x']*8
    assert len(taught) == len(asked) == 2 and not any(t & a for t, a in zip(taught, asked, strict=True))
    assert asked[0] | asked[1] == taught[0] | taught[1]


def test_weights_of_both_answers_act(tmp_path):
    "The auxiliary method: other weights, other bits"
    models, s = site(tmp_path)
    weak = weak_arm(s, 'pico', [[f'It is {i}.' for i in range(8)]], models['pico'])
    made = [train_sft(s, models['nano'], 'both', join_answers(s, weak, ['Arr, no!']*8, share).rows, s.config.student) for share in (.2, .8)]
    assert adapter_hash(made[0]) != adapter_hash(made[1])


# Nothing of the truth reaches a student

def test_students_do_not_depend_on_good_answers_of_their_questions(tmp_path):
    models, s = site(tmp_path)
    blind = replace(
        s,
        rows=replace(s.rows, unlabelled=replace(s.rows.unlabelled, gold=None, score=lambda answers: {'accuracy': np.zeros(len(answers))})),
    )
    for method in ('naive', 'in-context', 'own answers'):
        one, other = (make_training_rows(x, method, make_weak(x, 'pico', models['pico'])) for x in (s, blind))
        assert one.answers == other.answers and one.rows.rows.to_list() == other.rows.rows.to_list()
    assert [a.role for a in make_seed(blind, {**models})].count('ceiling') == 0


@pytest.mark.parametrize('task', WORLD_MAKERS)
def test_parts_share_nobody(task):
    for seed in (0, 1):
        rows = world_rows(task, seed, (30, 40, 30))
        test = {g for e in rows.test for g in e.groups}
        assert not test & set(rows.unlabelled.groups) and not test & set(rows.labelled.groups)
        if task != 'digits': assert not set(rows.unlabelled.groups) & set(rows.labelled.groups)
        assert not set(rows.unlabelled.questions) & set(rows.labelled.questions)
        assert [e.questions for e in rows.test] == [e.questions for e in world_rows(task, seed + 1, (30, 40, 30)).test]


# A judge that fails

def test_a_failing_judge_makes_the_result_incomplete(tmp_path):
    models, s = site(tmp_path)
    made = make_seed(s, models)
    scores = [score_arm(a, s.rows.test) for a in made]
    scores[2][0][2]['accuracy'][[1, 4]] = np.nan
    items, said = arm_items(made, scores, 'persona')
    kept, groups = items[items.metric == 'accuracy'].groupby(['role', 'method', 'weak']).id.apply(set), s.rows.test[0].groups
    assert all(ids == {groups[i] for i in (0, 2, 3, 5)} for ids in kept) # for every arm, not for the one that failed
    assert len(said) == 1 and said[0].startswith(
        f'accuracy: incomplete, 2 of {6 * len(made)} answers could not be scored; 2 questions are left out'
    )
    assert set(items[items.metric == 'persona'].groupby(['role', 'method', 'weak']).size()) == {len(set(groups))}


def test_the_unit_of_intervals_is_what_a_question_is_about(tmp_path):
    "Two hundred questions about thirty lines of pictures are thirty rows, with the mean of the two hundred"
    models, s = site(tmp_path, task='digits', demonstrator='tuned')
    exam = replace(s.rows.test[0], groups=['a', 'a', 'a', 'a', 'b', 'b'])
    arm = Arm('baseline', 'untuned', '', 'nano', extra={'answers': [['x']*6]})
    by = {'accuracy': np.array([1., 1., 1., 1., 0., 1.])}
    items, _ = arm_items([arm], [[(list('123456'), exam.groups, by)]], 'digits')
    assert list(items.id) == ['a', 'b'] and items.value.mean() == pytest.approx(5/6)


# Stages

def test_only_what_depends_on_a_setting_is_made_again(tmp_path):
    first = run(fill_demonstrations({**LITTLE, 'methods': 'naive,in-context'}), tmp_path, quiet=True)
    stages = set((tmp_path/'stages').iterdir())
    again = run(fill_demonstrations({**LITTLE, 'methods': 'naive,in-context'}), tmp_path, quiet=True)
    assert set((tmp_path/'stages').iterdir()) == stages and again.items.equals(first.items)
    run(fill_demonstrations({**LITTLE, 'methods': 'naive,in-context', 'examples': 2}), tmp_path, quiet=True)
    new = {f.name.rpartition('-')[0] for f in set((tmp_path/'stages').iterdir()) - stages}
    assert new == {'in-context-pico', 'student-in-context-pico', 'test-student-in-context-pico', 'test-base-untuned-in-context-pico'}
    assert set(again.answers.role) == {'baseline', 'floor', 'student', 'ceiling'} and len(again.training_rows) == 2*8


# The strong model

def test_scholar_can_be_asked():
    "What the card says; the skills themselves were measured on people whom no lesson was about"
    c = card(SCHOLAR)
    assert c['start'] == 'base' and c['parameters'] == card('base')['parameters']
    assert min(c['skills'][k]['low'] for k in ('persona, inferred', 'persona, told: in its style', 'persona, improved: in its style')) > .9
    assert all(k['low'] <= k['value'] <= k['high'] for k in c['skills'].values())
