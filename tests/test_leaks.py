"""Nobody and nothing of the test is in what a model learns from, or is shown: over all tasks of the embedded world, planted answers and
examples among them"""
import re
from dataclasses import replace
from functools import lru_cache

import pytest

from w2s.compare import demonstration_arms
from w2s.compare import demonstration_stages as transfer_stages
from w2s.compare.demonstration_arms import make_seed
from w2s.compare.demonstration_settings import METHODS, fill_demonstrations
from w2s.compare.demonstration_stages import Context
from w2s.compare.demonstration_tasks import WORLD_MAKERS, world_rows
from w2s.compare.label_data import label_halves, load_labels
from w2s.compare.label_settings import WORLD_TASKS, fill_labels
from w2s.compare.learn import Study
from w2s.compare.models import know_model
from w2s.compare.preference_data import halves, ladder_world, load_preferences
from w2s.compare.stages import Run
from w2s.compare.toxicity_data import rows_of
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.feedback.forms import WORLD
from w2s.models.zoo import model_folder
from w2s.train.generate import GenerateSettings
from w2s.world.lessons import school_parts
from w2s.world.parts import parts

SIZES = (120, 300, 200) # the defaults of `w2s run persona` and its like


@lru_cache(maxsize=1)
def everybody() -> frozenset[str]:
    "Names of all people and things of the world"
    world = ladder_world()
    return frozenset([p.name for p in world.people] + [t.name for t in world.things])


def named(texts) -> set[str]:
    "Who and what is named in some texts"
    return {w for t in texts for w in re.findall(r"[\w']+", t)} & everybody()


def exam_texts(exam) -> list[str]:
    "All that an exam says: questions, good answers, planted ones"
    return [*exam.questions, *(exam.gold or []), *(exam.planted or [])]


@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('seed', [0, 1, 4])
@pytest.mark.parametrize('task', WORLD_MAKERS)
def test_no_name_of_a_transfer_test_is_in_a_training_text(task, seed, trial):
    if task == 'digits' and trial: pytest.skip('digits have one test')
    rows = world_rows(task, seed, SIZES, trial)
    school = [t for r in rows.extra.get('warm_up', []) for t in (r['prompt'], r['completion'])]
    learned = {'taught': exam_texts(rows.labelled), 'asked': exam_texts(rows.unlabelled), 'school': school}
    test = named(t for e in rows.test for t in exam_texts(e))
    assert test or task == 'digits'                     # digits are about pictures, which have no names
    for what, texts in learned.items(): assert not named(texts) & test, (what, sorted(named(texts) & test)[:5])
    questions = {q for e in rows.test for q in e.questions}
    assert not questions & {*rows.labelled.questions, *rows.unlabelled.questions, *(r['prompt'] for r in rows.extra.get('warm_up', []))}
    assert not {g for e in rows.test for g in e.groups} & {*rows.labelled.groups, *rows.unlabelled.groups}
    assert not named(learned['taught']) & named(learned['asked'])   # nor do weak and strong model learn about the same ones


def test_the_school_of_the_strong_model_is_in_no_test():
    school = school_parts(ladder_world())['school']
    names = {p.name for p in school.people} | {t.name for t in school.things}
    for task in WORLD_MAKERS:
        rows = world_rows(task, 0, (30, 30, 200))
        assert not names & named(t for e in (rows.labelled, rows.unlabelled, *rows.test) for t in exam_texts(e)), task


@pytest.mark.parametrize('task', WORLD_MAKERS)
def test_no_name_of_the_test_reaches_a_training_or_an_example(task, tmp_path, monkeypatch):
    "Everything that a run trains on and asks, written down: all methods, with models that answer with what they were asked"
    methods = [m for m in METHODS if m != 'bootstrap']
    c = fill_demonstrations(
        dict(
            task=task,
            weak='pico',
            strong='nano',
            demonstrator='planted' if task in ('gender', 'digits') else 'tuned',
            methods=methods,
            ablation=(1, 2),
        )
        if task not in ('gender', 'digits')
        else dict(task=task, strong='nano', methods=methods, ablation=(1, 2))
    )
    rows, learned, asked = world_rows(task, 0, (24, 24, 20)), dict[str, list[str]](), dict[str, list[str]]()
    def train_sft(context, model, name, data, settings, start=None):
        learned[name] = [t for r in data.to_list() for t in (str(r['prompt']), r['completion'])]
        return tmp_path
    def make_speaker(context, model, name, adapter, settings=None, like=None):
        def speak(prompts):
            asked.setdefault(name, []).extend(map(str, prompts))
            return [[f' It is {str(p).split()[-2]} {i}.']*(settings.samples if settings else 1) for i, p in enumerate(prompts)]
        return speak
    for module in (transfer_stages, demonstration_arms):
        monkeypatch.setattr(module, 'train_sft', train_sft)
        monkeypatch.setattr(module, 'make_speaker', make_speaker)
    models = {n: know_model(n, str(model_folder(n)), c) for n in ('pico', 'nano')}
    context = Context(Study(c, Run(tmp_path, lambda line: None), True), rows, models['nano'], WORLD, GenerateSettings(16, 0., stop=('\n',)))
    make_seed(context, {**dict.fromkeys(c.weak), **models})
    test = named(t for e in rows.test for t in exam_texts(e))
    assert len(learned) >= len(methods) and any(k.startswith('test-') for k in asked)
    for what, texts in learned.items(): assert not named(texts) & test, what
    own = {q: named([q]) for e in rows.test for q in e.questions}
    for what, prompts in asked.items():
        for p in prompts:
            mine = (
                set().union(*(names for q, names in own.items() if q in p)) if what.startswith('test') or 'weak-answers' in what else set()
            )
            assert not (named([p]) & test) - mine, (what, p)


@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('seed', [0, 1, 4])
@pytest.mark.parametrize('task', WORLD_TASKS)
def test_no_thing_of_a_label_test_is_in_a_training_text(task, seed, trial):
    c = replace(fill_labels(dict(data=f'world:{task}')), trial=trial)
    data = load_labels(c, [])
    labelled, unlabelled = label_halves(c, data, seed)
    test = set(data.test['group'][:])
    for half in (labelled, unlabelled):
        assert not set(half['group'][:]) & test and not named(half['prompt'][:]) & test
        assert not set(half['prompt'][:]) & set(data.test['prompt'][:])
    assert not set(labelled['group'][:]) & set(unlabelled['group'][:])


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('source', ['world', 'world:1', 'world:100'])
def test_nobody_of_a_preference_test_is_in_a_training_row(source, seed):
    data = load_preferences(source, [], 200)
    labelled, unlabelled = halves(data.train, 400, 400, seed)
    def texts(rows): return [str(p) + c + r for p, c, r in zip(rows['prompt'], rows['chosen'], rows['rejected'], strict=True)]
    test = named(texts(data.test))
    assert (
        test
        and not named(texts(labelled)) & test
        and not named(texts(unlabelled)) & test
        and not named(texts(labelled)) & named(texts(unlabelled))
    )


@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('seed', [0, 1, 4])
def test_no_speaker_of_a_toxicity_test_is_in_a_training_scene(seed, trial):
    c = replace(fill_toxicity({}), trial=trial)
    rows = rows_of(c, parts(ladder_world(), seed, trial), None, seed)
    test = named(r['prompt'] + r['completion'] for r in rows.test)
    for part in (rows.labelled, rows.unlabelled): assert not named(r['prompt'] + r['completion'] for r in part) & test
