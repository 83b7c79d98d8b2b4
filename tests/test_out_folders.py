"""What is wrong with --out is said by the plan and before the first stage, not when the results are there"""
import json
import os

import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.comparison import run_experiment
from w2s.compare.label_settings import Classify
from w2s.compare.plan import plan
from w2s.compare.stages import check_out
from w2s.errors import ConfigError
from w2s.experiments.vary import plan_varied
from w2s.io.disk import failure_text
from w2s.io.manifests import seal_folder
from w2s.io.provenance import describe_making

def a_file(tmp): (tmp/'o').write_text('mine')
def below_a_file(tmp):
    (tmp/'f').write_text('mine')
    return tmp/'f'/'o'
def a_link(tmp):
    (tmp/'o').mkdir()
    (tmp/'elsewhere').mkdir()
    os.symlink(tmp/'elsewhere', tmp/'o'/'stages')
def a_report(tmp):
    (tmp/'o').mkdir()
    (tmp/'o'/'report.md').write_text('mine')
def an_adapter(tmp):
    (tmp/'o'/'adapters'/'mine').mkdir(parents=True)
    (tmp/'o'/'adapters'/'mine'/'adapter_config.json').write_text('{}')
def settings_of_mine(tmp):
    (tmp/'o').mkdir()
    (tmp/'o'/'config.toml').write_text('seeds = 1')


ODD = [(a_file, 'a file stands where a folder is needed'), (below_a_file, 'a file stands where a folder is needed'),
       (a_link, 'is a symbolic link'), (a_report, 'report.md is there, and it was not written by this command'),
       (an_adapter, 'adapters is there, and it was not'), (settings_of_mine, 'config.toml is there, and it was not')]


def said_of(error): return failure_text(error) or str(error)


def never(*args, **more): raise AssertionError('the data were read')


@pytest.mark.parametrize('make, told', ODD, ids=lambda x: getattr(x, '__name__', ''))
def test_a_plan_says_what_the_run_would_say(tmp_path, make, told):
    out = make(tmp_path) or tmp_path/'o'
    before = sorted(tmp_path.rglob('*'))
    config = Classify(n_labelled=8, n_unlabelled=8, n_test=8)
    for act in (lambda: plan(never, config, out), lambda: run_experiment(never, config, out)):
        with pytest.raises((ConfigError, OSError)) as e: act()
        assert told in said_of(e.value), said_of(e.value)
    if told.startswith(('a file', 'is a symbolic')):
        with pytest.raises((ConfigError, OSError)) as e: plan_varied(dict(data='world:safety'), 'n_labelled', ['8'], out, cls=Classify)
        assert told in said_of(e.value)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_command_says_it(tmp_path):
    a_file(tmp_path)
    done = CliRunner().invoke(app, ['run', 'safety', '--dry-run', '--out', str(tmp_path/'o')])
    assert 'a file stands where a folder is needed' in said_of(done.exception), done.exception


@pytest.mark.skipif(os.name == 'nt', reason='folders of other users are another matter there')
def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    from pathlib import Path
    (tmp_path/'o').mkdir()
    def denied(self, *a, **k): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'touch', denied)
    with pytest.raises(PermissionError) as e: plan(never, Classify(), tmp_path/'o')
    assert 'may not read or write there' in said_of(e.value)


def test_the_plan_names_the_other_run(tmp_path, monkeypatch):
    import w2s.compare.plan
    (tmp_path/'report.md').write_text('theirs')
    seal_folder(tmp_path, describe_making(settings='0'*12))
    check_out(tmp_path)
    monkeypatch.setattr(w2s.compare.plan, 'plan', lambda *a: 'THE PLAN')
    done = CliRunner().invoke(app, ['run', 'safety', '--dry-run', '--out', str(tmp_path)])
    assert "'THE PLAN'" in done.output and 'holds the results of another run' in done.output.replace('\n', ' '), done.output
    assert json.loads((tmp_path/'manifest.json').read_text())['made']['settings'] == '0'*12


# w2s verify, where other programs have files of the same name

def verified(folder):
    from w2s.compare.upkeep import verify_folder
    return {f.name: (f.problem, f.damaged) for f in verify_folder(folder)}


def test_a_manifest_of_another_program_is_not_damaged(tmp_path):
    (tmp_path/'manifest.json').write_text(json.dumps(dict(name='extension', manifest_version=3)))
    (tmp_path/'stages'/'mine').mkdir(parents=True)
    with pytest.raises(ConfigError, match='holds nothing that w2s has written; manifest.json was not written by w2s: it lists no files'):
        verified(tmp_path)
    (tmp_path/'stages'/'student-0123456789ab').mkdir(parents=True)
    found = verified(tmp_path)
    assert found['manifest.json'][1] is False and found['mine'][1] is False and 'was not made by w2s' in found['mine'][0]
    assert found['student-0123456789ab'] == ('manifest.json is missing', True)


def test_a_manifest_of_w2s_that_was_changed_is(tmp_path):
    (tmp_path/'report.md').write_text('mine')
    seal_folder(tmp_path, {})
    path = tmp_path/'manifest.json'
    for text in (path.read_text().replace('report', 'repart'), path.read_text()[:40], ''):
        path.write_text(text)
        assert verified(tmp_path)['manifest.json'] == (
            'the manifest was changed or cut off after w2s wrote it, so that its results cannot be checked', True
        )


def test_a_file_is_no_folder(tmp_path):
    a_file(tmp_path)
    with pytest.raises(ConfigError, match='o is a file; give the --out of a run'): verified(tmp_path/'o')
