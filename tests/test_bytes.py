"Whatever is kept is checked before it is used again: bits that flip, files that are cut or emptied, kills in the middle of writing"
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import reward_folder
from matplotlib.figure import Figure

from w2s.cli.app import weak_teacher_config
from w2s.compare.comparison import run_experiment
from w2s.compare.stages import Run, claim, run_stage
from w2s.compare.upkeep import find_unused, verify_folder
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ConfigError, ModelError, W2SWarning
from w2s.experiments import preferences as page
from w2s.experiments.preferences import run
from w2s.io import manifests
from w2s.io.manifests import INCOMPLETE, MANIFEST, find_damage, read_manifest
from w2s.io.provenance import package_versions
from w2s.models.adapters import add_adapter, load_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.report.write import write
from w2s.train import generate as generating
from w2s.train import loop, reference

TOML = '''
data = "{home}/data"
weak = "{home}/weak"
strong = "{home}/strong"
gold = "{home}/gold"
n_labelled = 24
n_unlabelled = 24
n_test = 12
samples = 1
response_tokens = 12
others = []
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2, dropout = 0.1}}
sft = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
dpo = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
'''
DAMAGE = {
    'flip': lambda data: data[:len(data)//2] + bytes([data[len(data)//2] ^ 16]) + data[len(data)//2 + 1:],
    'cut': lambda data: data[:len(data)//2],
    'empty': lambda data: b''}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows, models, a reward model, and the settings"
    home = tmp_path_factory.mktemp('bytes')
    write_samples(home/'data', 70, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(70, seed=4)]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=2, seed=2)
    reward_folder(home/'gold', texts*5)
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    return home


def go(home, out, keep=False):
    "A run from start to end: the lines that it says, the warnings, and the result"
    said, config = [], weak_teacher_config({}, home/'run.toml')
    with warnings.catch_warnings(record=True) as warned, pytest.MonkeyPatch.context() as m:
        warnings.simplefilter('always', W2SWarning)
        m.setattr(
            page,
            'run_experiment',
            lambda open_it, config, out, quiet, keep: run_experiment(
                open_it, config, out, quiet, keep, lambda line: said.append(line.partition('] ')[2] or line)
            ),
        )
        m.setattr('builtins.print', lambda *a, **k: None)
        m.setattr(page, 'check_cut', lambda *a: None) # models of a few steps do not end their responses
        m.setattr('w2s.report.preferences.result_figure', lambda result: Figure()) # drawing takes longer than all the rest
        result = run(config, out, keep=keep)
        write(result)
    return [*said, *(str(w.message) for w in warned if issubclass(w.category, W2SWarning))], result


@pytest.fixture(scope='module')
def straight(home):
    "A run that nobody disturbs"
    reference._SEEN.clear()
    return home/'straight', go(home, home/'straight')[1]


def weights(out):
    "Every trained adapter, as bytes"
    return {str(p.relative_to(out/'adapters')): p.read_bytes() for p in sorted((out/'adapters').rglob('adapter_model.safetensors'))}


def same(out, result, straight):
    "Is a run what the undisturbed one is, to the bit, and whole?"
    pd.testing.assert_frame_equal(result.items, straight[1].items, check_exact=True)
    assert weights(out) == weights(straight[0])
    assert [str(f) for f in verify_folder(out) if f.problem] == []
    assert not (out/INCOMPLETE).exists()


KEPT = { # kind -> a file of it
    'stage: rewards': 'stages/weak-seed0-labels-*/rewards.npy',
    'stage: scores': 'stages/student-*-test-*/scores.parquet',
    'stage: texts': 'stages/*responses-*/texts.json',
    'stage: adapter of an SFT': 'stages/weak-seed0-sft-*/adapter/adapter_model.safetensors',
    'stage: settings of an adapter': 'stages/student-seed0-dpo-*/adapter/adapter_config.json',
    'stage: inputs': 'stages/student-seed0-sft-*/inputs.json',
    'stage: curve': 'stages/student-seed0-sft-*/history.csv',
    'stage: manifest': 'stages/weak-seed0-labels-*/manifest.json',
    'key of log-probs': 'store/*/key.json',
    'kept gold scores': 'gold/*.npy',
    'results: table': 'items.parquet',
    'results: report': 'report.md',
    'results: settings': 'config.toml',
    'results: adapter': 'adapters/student-dpo-weak-weak-strong-seed0/adapter_model.safetensors',
    'results: manifest': 'manifest.json',
    'last run': '.run.json',
    'holder': '.holder.json',
}


def harm(out, kind, damage):
    "Damage one file of a kind; the file"
    file = sorted(out.glob(KEPT[kind]))[0]
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    return file


@pytest.mark.cases(2)
@pytest.mark.parametrize('kind', KEPT)
def test_a_damaged_file_is_named_or_made_again(home, straight, tmp_path, kind):
    "The same command after one bit of a finished run was flipped: the same bits; a stage that was not whole was named"
    out = tmp_path/'run'
    shutil.copytree(straight[0], out)
    file = harm(out, kind, 'flip')
    if kind.startswith(('stage', 'results')): assert [f for f in verify_folder(out) if f.problem and f.damaged]
    reference._SEEN.clear()
    said, result = go(home, out)
    if kind.startswith('stage'):
        assert sum('DAMAGED' in line for line in said) == 1 and file.parents[len(file.relative_to(out).parts) - 3].name.rpartition('-')[
            0
        ] in ' '.join(said)
    if kind == 'kept gold scores': assert sum('is damaged' in line for line in said) == 1
    same(out, result, straight)


@pytest.mark.cases(1)
@pytest.mark.parametrize('damage', ['cut', 'empty'])
def test_damage_of_every_kind_at_once(home, straight, tmp_path, damage):
    "A file of each kind is cut or emptied: each is named before anything is run, and all are made again"
    for kind in KEPT:
        one = tmp_path/kind.replace(': ', '-').replace(' ', '-')
        shutil.copytree(straight[0], one)
        harm(one, kind, damage)
        if kind.startswith(('stage', 'results')): assert [f for f in verify_folder(one) if f.problem and f.damaged], kind
    out = tmp_path/'run'
    shutil.copytree(straight[0], out)
    stages = {harm(out, kind, damage).relative_to(out).parts[1] for kind in KEPT if kind.startswith('stage')}
    for kind in KEPT:
        if not kind.startswith('stage'): harm(out, kind, damage)
    reference._SEEN.clear()
    said, result = go(home, out)
    assert {s for s in stages if not any('DAMAGED' in line and s.rpartition('-')[0] in line for line in said)} == set()
    same(out, result, straight)


@pytest.mark.cases(2)
@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_log_probs_are_computed_again(home, straight, tmp_path, damage):
    "Each kept part in turn, with the stage that reads it gone"
    out = tmp_path/'run'
    shutil.copytree(straight[0], out)
    parts = sorted(out.glob('store/*/*.npy'))
    for file in parts: file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for pattern in ('*-dpo-*', '*-labels-*', '*-test-*'):
        for stage in out.glob(f'stages/{pattern}'): shutil.rmtree(stage, ignore_errors=True)
    reference._SEEN.clear()
    said, result = go(home, out)
    assert sum('computed again' in line for line in said) == len(parts)
    same(out, result, straight)


class Killed(BaseException): pass


def stop_at(monkeypatch, module, name, call):
    "Die at the n-th call of a function"
    real, calls = getattr(module, name), []
    def dies(*a, **k):
        calls.append(1)
        if len(calls) == call: raise Killed
        return real(*a, **k)
    monkeypatch.setattr(module, name, dies)


@pytest.mark.cases(1)
@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('file', ['adapter.safetensors', 'optimizer.pt', 'history.json', 'manifest.json'])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(home, straight, tmp_path, monkeypatch, file, damage):
    "Killed in the sixth step, with checkpoints after the second and the fourth; the newer one is damaged"
    out = tmp_path/'run'
    with monkeypatch.context() as m:
        stop_at(m, loop, 'take_step', 6)
        with pytest.raises(Killed): go(home, out)
    (newest,) = out.glob('stages/.unfinished-*/checkpoints/step-000004')
    (newest/file).write_bytes(DAMAGE[damage]((newest/file).read_bytes()))
    steps, take = [], loop.take_step
    with monkeypatch.context() as m:
        m.setattr(loop, 'take_step', lambda *a: steps.append(1) or take(*a))
        said, result = go(home, out)
    assert any('step-000004 is damaged' in line for line in said) and any('going on' in line for line in said)
    same(out, result, straight)


@pytest.mark.cases(1)
@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_journal_is_named_and_its_rows_are_made_again(home, straight, tmp_path, monkeypatch, damage):
    "Killed in the fourth batch of the answers; a line in the middle is damaged"
    out = tmp_path/'run'
    with monkeypatch.context() as m:
        m.setattr(generating, 'POOL', 1) # batches do not refill each other: one call for each
        stop_at(m, generating, 'write', 4)
        m.setattr(page, 'write_responses', page.write_responses)
        m.setattr('w2s.compare.gold.sampling', lambda c: small(c))
        with pytest.raises(Killed): go(home, out)
    (journal,) = out.glob('stages/.unfinished-*/checkpoints/texts.jsonl')
    lines = journal.read_bytes().split(b'\n')
    assert len(lines) == 5
    lines[2] = DAMAGE[damage](lines[2])
    journal.write_bytes(b'\n'.join(lines))
    said, result = go(home, out)
    assert any('has 1 damaged lines' in line for line in said)
    same(out, result, straight)


def small(config):
    "As the settings say, but in small batches, which changes no text"
    from dataclasses import replace

    from w2s.compare.preference_settings import sampling
    return replace(sampling(config), token_budget=64)


@pytest.mark.parametrize(
    'other, keep, found', [('torch', False, False), ('torch', True, True), ('bitsandbytes', False, False), ('numpy', False, True)]
)
def test_stages_of_other_versions(tmp_path, other, keep, found):
    "A stage that was made by another version of a package that computes is named, and made anew unless one says to keep it"
    said, done = [], []
    def work(folder): done.append(1); (folder/'x').write_text('x')
    folder = run_stage(Run(tmp_path, said.append), 'one', {}, work)
    manifest = read_manifest(folder/MANIFEST)
    manifests.seal_folder(
        folder, manifest['made'] | {'versions': package_versions() | ({other: '0.0.1'} if other in package_versions() else {})}
    )
    run_stage(Run(tmp_path, said.append, keep), 'one', {}, work)
    assert len(done) == (1 if found else 2)
    assert ('0.0.1' in said[-1]) == (other in package_versions())


def test_a_manifest_says_what_made_a_stage(straight):
    made = read_manifest(next(straight[0].glob('stages/student-seed0-dpo-*'))/MANIFEST)['made']
    assert {'versions', 'commit', 'host', 'threads', 'device', 'command', 'time', 'seconds'} <= made.keys()
    assert {'w2s', 'torch', 'transformers', 'peft', 'bitsandbytes'} == made['versions'].keys()


def test_results_of_another_run_do_not_stay(home, tmp_path, straight):
    "Fewer arms, no answers, in the same folder: nothing of the first run is left beside the second one's report"
    out = tmp_path/'run'
    shutil.copytree(straight[0], out)
    assert (out/'responses.parquet').is_file() and (out/'adapters'/'floor-dpo-human-weak-seed0').is_dir()
    (tmp_path/'judge.toml').write_text((home/'run.toml').read_text().replace('response_tokens = 12', ''))
    config = weak_teacher_config({'supervisor': 'judge', 'samples': 0, 'gold': ''}, tmp_path/'judge.toml')
    write(run(config, out, quiet=True))
    assert (
        not (out / 'responses.parquet').exists()
        and not (out / 'adapters' / 'floor-dpo-human-weak-seed0').exists()
        and not (out / 'gold.parquet').exists()
    )
    assert {p.name for p in out.iterdir() if not p.name.startswith('.')} == {
        Path(f).parts[0] for f in read_manifest(out / MANIFEST)['files']
    } | {'manifest.json', 'stages', 'store', 'gold'}
    assert find_damage(out) == []
    assert {p.name.rpartition('-')[0] for p in find_unused(out)} >= {'weak-seed0-dpo', 'weak-seed0-sft'}


def test_whose_results_are_replaced_is_said(home, tmp_path, straight, capsys, monkeypatch):
    out = tmp_path/'run'
    monkeypatch.setattr(page, 'check_cut', lambda *a: None)
    shutil.copytree(straight[0], out)
    run(weak_teacher_config({'seeds': 2, 'n_labelled': 8, 'n_unlabelled': 8}, home/'run.toml'), out)
    assert 'holds the results of another run' in capsys.readouterr().out
    assert 'results are not written yet' in (out/INCOMPLETE).read_text()
    assert any(f.kind == 'run' for f in verify_folder(out))


@pytest.mark.parametrize('call', range(1, 12))
def test_killed_while_results_are_replaced(tmp_path, monkeypatch, call):
    "At each rename: the folder holds the old set, or says that it is not complete; the next try ends well"
    def write(names):
        def into(folder):
            for n in names: (folder/n).mkdir() if '.' not in n else (folder/n).write_text(n)
            for n in names:
                if '.' not in n: (folder/n/'w.bin').write_bytes(b'w')
        return into
    first, second = ('a.txt', 'b.txt', 'adapters'), ('b.txt', 'c.txt', 'adapters', 'd.txt')
    manifests.publish(tmp_path, write(first), {})
    with monkeypatch.context() as m:
        stop_at(m, os, 'replace', call)
        try: manifests.publish(tmp_path, write(second), {})
        except Killed:
            there = {p.name for p in tmp_path.iterdir() if not p.name.startswith('.')} - {MANIFEST}
            assert (tmp_path/INCOMPLETE).exists() or find_damage(tmp_path) == [] and there in ({*first}, {*second})
    manifests.publish(tmp_path, write(second), {})
    assert {p.name for p in tmp_path.iterdir()} == {*second, MANIFEST, f'.{MANIFEST}'} and find_damage(tmp_path) == []


FOREIGN = {
    'a file': lambda p: p.write_text('mine'),
    'a folder': lambda p: (p.mkdir(), (p / 'x').write_text('mine')),
    'a link': lambda p: p.symlink_to(p.parent.parent / 'elsewhere'),
}


@pytest.mark.cases(3)
@pytest.mark.parametrize('kind', FOREIGN)
@pytest.mark.parametrize('name', ['report.md', 'items.parquet', 'adapters', 'config.toml'])
def test_the_users_own_files_stay(home, straight, tmp_path, kind, name):
    (tmp_path/'elsewhere').write_text('elsewhere')
    out = tmp_path/'mine'
    out.mkdir()
    FOREIGN[kind](out/name)
    with pytest.raises(ConfigError, match='was not written by this command'): write(replaced(straight[1], out))
    assert (out/name).is_symlink() or (out/name).is_dir() or (out/name).read_text() == 'mine'
    assert (tmp_path/'elsewhere').read_text() == 'elsewhere'


def replaced(result, out):
    from dataclasses import replace
    return replace(result, folder=out)


@pytest.mark.parametrize('name', ['stages', 'store'])
def test_links_to_folders_are_not_written_through(tmp_path, name):
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/name).symlink_to(tmp_path/'elsewhere')
    with pytest.raises(ConfigError, match='symbolic link'), claim(tmp_path/'run', {}): pass
    assert not any((tmp_path/'elsewhere').iterdir())


def test_a_link_among_the_results_is_replaced(straight, tmp_path):
    "A link that stands where w2s has written before: the file that it points to stays as it was"
    out = tmp_path/'run'
    shutil.copytree(straight[0], out)
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'x').write_text('x')
    for name, target in (('items.parquet', tmp_path/'x'), ('adapters', tmp_path/'elsewhere')):
        shutil.rmtree(out/name) if (out/name).is_dir() else (out/name).unlink()
        (out/name).symlink_to(target)
    write(replaced(straight[1], out))
    assert (tmp_path/'x').read_text() == 'x' and not any((tmp_path/'elsewhere').iterdir())
    assert not (out/'adapters').is_symlink() and find_damage(out) == []


# Adapters

@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('file', ['adapter_model.safetensors', 'adapter_config.json', 'w2s.json'])
def test_a_damaged_adapter_is_refused(home, straight, tmp_path, file, damage):
    shutil.copytree(straight[0]/'adapters'/'student-dpo-weak-weak-strong-seed0', tmp_path/'a')
    base = load_base(home/'strong', LoadSettings('none', 'float32'))
    load_adapter(base, tmp_path/'a').unload()
    (tmp_path/'a'/file).write_bytes(DAMAGE[damage]((tmp_path/'a'/file).read_bytes()))
    with pytest.raises(ModelError, match=f'is damaged: {file}'): load_adapter(base, tmp_path/'a')


def test_nothing_half_written_leaks_into_an_adapter(home, tmp_path):
    "PEFT reads a README.md that is there, amends it, and names a path in it: it belongs to no adapter"
    base = load_base(home/'strong', LoadSettings('none', 'float32'))
    model = add_adapter(base)
    save_adapter(model, base, tmp_path/'a')
    save_adapter(model, base, tmp_path/'b')
    (tmp_path/'b'/'README.md').write_text('half of a')
    save_adapter(model, base, tmp_path/'b')
    assert (
        sorted(p.name for p in (tmp_path / 'a').iterdir()) == sorted(p.name for p in (tmp_path / 'b').iterdir())
        and not (tmp_path / 'b' / 'README.md').exists()
    )
    (tmp_path/'b'/'notes.txt').write_text('mine')
    with pytest.raises(ModelError, match='notes.txt'): save_adapter(model, base, tmp_path/'b')
    model.unload()


# What a result depends on

CHANGES = {
    'tokenizer.json': lambda t: t[::-1].replace('}', '} ', 1)[::-1],
    'chat_template.jinja': lambda t: "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
    'tokenizer_config.json': lambda t: t.replace('{', '{"add_prefix_space": false, ', 1),
    'special_tokens_map.json': lambda t: '{"additional_special_tokens": []}',
    'generation_config.json': lambda t: t.replace('{', '{"max_new_tokens": 3, ', 1),
    'config.json': lambda t: t.replace('{', '{"label_smoothing": 0, ', 1)}


@pytest.mark.cases(5)
@pytest.mark.parametrize('file', CHANGES)
def test_a_changed_model_folder_is_another_model(home, tmp_path, file, monkeypatch):
    "Weights the same, another file of the folder changed: nothing is found, and it is said; put back, all of it is"
    from w2s.files.refine import fill_refine, refine_file
    shutil.copytree(home/'strong', tmp_path/'m')
    rows = [dict(question=f'What is {i}?', answer=f'{i}') for i in range(6)]
    (tmp_path/'q.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    job = fill_refine(
        dict(
            questions=str(tmp_path / 'q.jsonl'),
            strong=str(tmp_path / 'm'),
            method='ask-to-improve',
            max_tokens=4,
            load=dict(quantize='none', dtype='float32'),
        )
    )
    lines = []
    monkeypatch.setattr('builtins.print', lambda *a, **k: lines.append(' '.join(map(str, a))))
    def again():
        lines.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always', W2SWarning)
            refine_file(job, tmp_path/'out.jsonl')
        return any(line.endswith(': found') for line in lines), any('have changed since the last run' in str(w.message) for w in warned)

    assert again() == (False, False) and again() == (True, False)
    old = (tmp_path/'m'/file).read_text() if (tmp_path/'m'/file).exists() else None
    (tmp_path/'m'/file).write_text(CHANGES[file](old or ''))
    assert again() == (False, True)
    (tmp_path/'m'/file).write_text(old) if old is not None else (tmp_path/'m'/file).unlink()
    assert again() == (True, True)


@pytest.mark.long
def test_a_changed_loss_is_another_stage(home, tmp_path, monkeypatch):
    "The body of a loss was changed, its name was not: its trainings are done anew, the others are found"
    from w2s.train import losses
    said, first = go(home, tmp_path)
    monkeypatch.setitem(
        losses.PREFERENCE_LOSSES.found,
        'dpo',
        replace(
            losses.PREFERENCE_LOSSES['dpo'], function=lambda gap, target, beta, smoothing=0.0: losses.ipo(gap, target, beta, smoothing)
        ),
    )
    said, second = go(home, tmp_path)
    found = {line.rpartition(': ')[0]: line.rpartition(': ')[2] for line in said}
    assert found['weak-seed0-sft'] == 'found' and found['weak-seed0-dpo'] == 'starting' and found['student-seed0-dpo'] == 'starting'
    assert not second.items.equals(first.items)


# Scorers

@pytest.fixture(scope='module')
def scorer(tmp_path_factory):
    from w2s.data.toxicity_rows import read_toxicity
    from w2s.evaluate.toxicity_scorers import fit_ridge, save_ridge
    home = tmp_path_factory.mktemp('scorer')
    rows = [
        dict(text=f'{"you fool" if i % 2 else "thank you"} {i} {"go away" if i % 3 else "please"}', score=0.9 * (i % 2)) for i in range(60)
    ]
    (home/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return save_ridge(fit_ridge(read_toxicity([home/'rows.jsonl']).rows, 0, .2), home/'scorer')


SCORER_DAMAGE = {
    **DAMAGE,
    'list': lambda data: b'[]',
    'other text': lambda data: b'{"kind": "ridge"}',
    'words swapped': lambda data: b'\n'.join(data.split(b'\n')[::-1]),
    'gone': None,
}


@pytest.mark.parametrize('damage', SCORER_DAMAGE)
@pytest.mark.parametrize('file', ['card.json', 'ridge.npz', 'words.txt', 'letters.txt', 'manifest.json'])
def test_a_damaged_scorer_is_refused(scorer, tmp_path, file, damage):
    from w2s.evaluate.toxicity_scorers import load_ridge
    shutil.copytree(scorer, tmp_path/'s')
    load_ridge(tmp_path/'s')
    if SCORER_DAMAGE[damage] is None: (tmp_path/'s'/file).unlink()
    else: (tmp_path/'s'/file).write_bytes(SCORER_DAMAGE[damage]((tmp_path/'s'/file).read_bytes()))
    if (file, damage) == ('manifest.json', 'gone'): return load_ridge(tmp_path/'s') and None # as scorers were before they had one
    with pytest.raises(ModelError, match='is damaged: '): load_ridge(tmp_path/'s')


@pytest.mark.parametrize(
    'file, damage',
    [(f, d) for f in ('card.json', 'ridge.npz', 'words.txt') for d in ('cut', 'empty', 'list', 'gone', 'other text')]
    + [('ridge.npz', 'nan'), ('ridge.npz', 'flip')],
)
def test_a_damaged_scorer_without_a_manifest_is_refused(scorer, tmp_path, file, damage):
    from w2s.evaluate.toxicity_scorers import load_ridge
    shutil.copytree(scorer, tmp_path/'s')
    (tmp_path/'s'/'manifest.json').unlink()
    path = tmp_path/'s'/file
    if damage == 'gone': path.unlink()
    elif damage == 'nan':
        with np.load(path) as kept: np.savez(path, **{**{k: kept[k] for k in kept.files}, 'weights': kept['weights']*np.nan})
    else: path.write_bytes(SCORER_DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ModelError): load_ridge(tmp_path/'s')


def test_the_date_of_a_template_is_that_of_the_first_run(home, tmp_path, monkeypatch):
    "A template that writes the date: gone on with the next day, all is found; another folder on another day is asked another question"
    import datetime

    from w2s.compare import stages
    from w2s.files.refine import fill_refine, refine_file
    from w2s.train import sandbox
    shutil.copytree(home/'strong', tmp_path/'m')
    (tmp_path / 'm' / 'chat_template.jinja').write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %} "
        "{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    rows = [dict(question=f'What is {i}?', answer=f'{i}') for i in range(4)]
    (tmp_path/'q.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    job = fill_refine(
        dict(
            questions=str(tmp_path / 'q.jsonl'),
            strong=str(tmp_path / 'm'),
            method='ask-to-improve',
            max_tokens=4,
            load=dict(quantize='none', dtype='float32'),
        )
    )
    lines, inputs = [], []
    monkeypatch.setattr('builtins.print', lambda *a, **k: lines.append(' '.join(map(str, a))))
    clock: dict = {}
    class Day(datetime.date):
        @classmethod
        def today(cls): return cls(*clock['now'])
    monkeypatch.setattr(stages, 'date', Day)
    before = sandbox.frozen_date()
    try:
        for now, out in (((2026, 11, 29), 'a'), ((2026, 11, 30), 'a'), ((2026, 11, 30), 'b')):
            clock['now'] = now
            lines.clear()
            refine_file(job, tmp_path/f'{out}.jsonl')
            inputs.append(
                (
                    any(line.endswith(': found') for line in lines),
                    *{json.loads(f.read_text())['date'] for f in (tmp_path / f'{out}.work').glob('stages/*/inputs.json')},
                )
            )
    finally: sandbox.freeze_date(before)
    assert inputs == [(False, '2026-11-29'), (True, '2026-11-29'), (False, '2026-11-30')]
