"""Settings and flags: the constructor is the command, every field has its flag, help is the comment beside the field, old names are
understood, any setting can be varied"""
import dataclasses
import re
import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from w2s.cli import demonstrations, labels
from w2s.cli.app import app, weak_teacher_config
from w2s.compare.config import to_table, to_toml
from w2s.compare.demonstration_settings import DemonstrationSettings, fill_demonstrations
from w2s.compare.label_settings import Classify, fill_labels
from w2s.compare.options import field_comments, option_settings, options_of, parse_text
from w2s.compare.preference_settings import LabelUse, WeakTeacher, fill_settings
from w2s.compare.settings import FITS, Settings, make_settings
from w2s.compare.toxicity_settings import Toxicity, fill_toxicity
from w2s.errors import ConfigError, W2SWarning
from w2s.experiments.vary import variants
from w2s.train.settings import GenerateSettings, TrainSettings

ALL = (WeakTeacher, Classify, DemonstrationSettings, Toxicity)
FILL = {WeakTeacher: fill_settings, Classify: fill_labels, DemonstrationSettings: fill_demonstrations, Toxicity: fill_toxicity}
OWN = {
    WeakTeacher: dict(data='rows.jsonl', weak='W', strong='S'),
    Classify: dict(data='rows.csv', weak='W', strong='S'),
    DemonstrationSettings: dict(task='gsm8k', data='rows.jsonl', weak='W', strong='S'),
    Toxicity: dict(data='rows.jsonl', scorer='s', weak='W', strong='S'),
}
COMMANDS = {
    'preferences': lambda t: weak_teacher_config(t, None),
    'safety': lambda t: labels.classify_config('safety', t, None),
    'legal': lambda t: labels.classify_config('legal', t, None),
    'persona': lambda t: demonstrations.transfer_config('persona', t, None),
    'gender': lambda t: demonstrations.transfer_config('gender', t, None),
    'digits': lambda t: demonstrations.transfer_config('digits', t, None),
    'maths': lambda t: demonstrations.transfer_config('gsm8k', t, None),
    'toxicity': lambda t: demonstrations.toxicity_config(t, None),
}
SAME = {
    'preferences': WeakTeacher(),
    'safety': Classify(),
    'legal': Classify('world:storage'),
    'persona': DemonstrationSettings(),
    'gender': DemonstrationSettings(task='gender'),
    'digits': DemonstrationSettings(task='digits'),
    'maths': DemonstrationSettings(task='gsm8k'),
    'toxicity': Toxicity(),
}


def w2s(*words): return CliRunner().invoke(app, ['run', *map(str, words)], env={'COLUMNS': '80', 'TERMINAL_WIDTH': '80'})
def ids(x): return getattr(x, '__name__', str(x))


# The constructor and the command

@pytest.mark.parametrize('command', COMMANDS)
def test_the_class_is_the_command(command):
    "Without arguments both run the same experiment"
    assert SAME[command] == COMMANDS[command]({})


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_everything_is_filled_in(cls):
    "No field is left open, nested ones included, and what is written is read again"
    for given in ({}, OWN[cls]):
        c = cls(**given)
        assert FITS not in [getattr(c, f.name) for f in dataclasses.fields(c)] and 'FITS' not in repr(c)
        assert FILL[cls](to_table(c)) == c and dataclasses.replace(c) == c
        top = re.findall(r'(?m)^(\w+) = |^\[(\w+)\]', to_toml(c))
        # None: TOML has no word for it
        assert {f.name for f in dataclasses.fields(c)} - {a or b for a, b in top} <= {'smoothing', 'threshold'}


PAPER = {
    WeakTeacher: dict(
        seeds=1,
        max_length=512,
        beta=0.1,
        n_test=500,
        n_labelled=None,
        n_unlabelled=None,
        samples=0,
        response_tokens=256,
        temperature=0.7,
        sft=TrainSettings(batch_size=32, learning_rate=2e-4),
        dpo=TrainSettings(),
    ),
    Classify: dict(
        seeds=1,
        max_length=512,
        n_test=1000,
        n_labelled=None,
        readout='head',
        student=TrainSettings(2, 32, 2e-4),
        supervisor=TrainSettings(2, 32, 2e-4),
    ),
    DemonstrationSettings: dict(
        seeds=1,
        max_length=1024,
        n_labelled=120,
        n_unlabelled=200,
        n_test=100,
        max_tokens=256,
        demonstrator='tuned',
        student=TrainSettings(3, 16, 2e-4),
    ),
    Toxicity: dict(
        seeds=1,
        n_labelled=1000,
        n_unlabelled=1500,
        n_test=200,
        beta=0.1,
        speak=GenerateSettings(20, 1.0, 0.9, samples=25),
        sft=TrainSettings(3, 16, 2e-4),
        dpo=TrainSettings(1, 16, 5e-5),
    ),
}


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_data_and_models_of_ones_own_have_the_papers_values(cls):
    c = cls(**OWN[cls])
    assert {k: getattr(c, k) for k in PAPER[cls]} == PAPER[cls] and c.load.dtype == 'auto'


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_defaults_go_by_models_and_by_data_apart(cls):
    "Models of the ladder on own data, other models on the world"
    small, large = cls(**{k: v for k, v in OWN[cls].items() if k not in ('weak', 'strong')}), cls(weak='W', strong='S')
    assert small.seeds == cls().seeds > 1 == large.seeds and small.load.dtype == 'float32' and large.load.dtype == 'auto'
    assert large.n_test == cls().n_test != small.n_test


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_what_is_given_holds(cls):
    "Each number of its own, a part of a group, and a whole group"
    assert (cls(seeds=7).seeds, cls(n_labelled=33).n_labelled, cls(n_test=5).n_test) == (7, 33, 5)
    stage = next(f.name for f in dataclasses.fields(cls) if isinstance(getattr(cls(), f.name), TrainSettings))
    usual = getattr(cls(), stage)
    assert getattr(cls(**{stage: dict(warmup=.3)}), stage) == dataclasses.replace(usual, warmup=.3)
    assert getattr(cls(**{stage: TrainSettings()}), stage) == TrainSettings()
    assert make_settings(cls, {stage: {'warmup': .3}}) == cls(**{stage: {'warmup': .3}})


PLAIN = {
    WeakTeacher: ('others', 'human', ('human',)),
    Classify: ('strong', 'nano, base', ('nano', 'base')),
    DemonstrationSettings: ('methods', 'naive,own-answers', ('naive', 'own answers')),
    Toxicity: ('methods', 'naive', ('naive',)),
}


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_a_plain_text_is_enough_for_several_names(cls):
    field, text, value = PLAIN[cls]
    assert getattr(cls(**{field: text}), field) == value == getattr(FILL[cls]({field: text}), field)


WRONG = {
    'seeds=0': dict(seeds=0),
    'n_test=0': dict(n_test=0),
    'n_labelled=0': dict(n_labelled=0),
    'max_length=0': dict(max_length=0),
    'a word for a number': dict(seeds='many'),
    'a list for a number': dict(n_test=[1]),
    'no such stage': dict(load=dict(quantise='none')),
    'a split that is none': dict(split='trian=a'),
}


@pytest.mark.parametrize('cls', ALL, ids=ids)
@pytest.mark.parametrize('wrong', WRONG)
def test_wrong_values_are_refused_by_all_in_one_sentence(cls, wrong):
    with pytest.raises(ConfigError) as e: cls(**WRONG[wrong])
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('cls', [WeakTeacher, Classify], ids=ids)
@pytest.mark.parametrize('n', [1.5, -.2, 0., float('nan')])
def test_a_share_of_examples_is_one(cls, n):
    with pytest.raises(ConfigError): cls(n_labelled=n)


def test_a_plain_field_of_a_user_joins_in():
    "A class of one's own has all that the four have"
    @dataclasses.dataclass(frozen=True)
    class Mine(Settings): "Nothing more"
    assert Mine().n_test == 500 and {o.flag for o in options_of(Mine)} >= {'n-labelled', 'quantize', 'seeds'}


# Flags

@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_every_field_has_its_flag(cls):
    "Walked field by field, groups too; the task is what a command is named by"
    want = set()
    for f in dataclasses.fields(cls):
        value = getattr(cls(), f.name)
        want |= {f'{f.name}.{g.name}' for g in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {f.name}
    assert want - {'task'} == {p for o in options_of(cls) for p in o.paths}


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_help_is_the_comment_beside_the_field(cls):
    "Every option explains itself, without marks that only a page of code would have"
    for o in options_of(cls):
        assert o.help and '`' not in o.help and len(o.help) < 420, o.flag
        if len(o.paths) == 1 and '.' not in o.paths[0]: assert o.help.startswith(field_comments(cls)[o.paths[0]])
    assert set(field_comments(LabelUse)) == {f.name for f in dataclasses.fields(LabelUse)}


SHARED = (
    '--n-labelled',
    '--n-unlabelled',
    '--n-test',
    '--weak',
    '--strong',
    '--seeds',
    '--max-length',
    '--lr',
    '--batch-size',
    '--token-budget',
    '--strict',
    '--vary',
    '--values',
    '--dry-run',
    '--config',
    '--out',
    '--keep-stages',
)


@pytest.mark.parametrize('command', [*COMMANDS, 'classify', 'explanation'])
def test_all_commands_have_the_same_names(command):
    "In the help, in six groups, on eighty columns; old names are not shown"
    text = w2s(command, '--help').output
    assert not [f for f in SHARED if f not in text] and max(map(len, text.splitlines())) <= 80
    panels = [p for p in re.findall(r'─ (\w+) ─', text) if p != 'Options']
    assert panels == ['Data', 'Models', 'Method', 'Training', 'Evaluation', 'Machines', 'Output']
    for old in ('--rows', '--gold-rows', '--label-share', '--test-rows'): assert old not in text
    if command != 'preferences': assert '--method' in text


@pytest.mark.parametrize('cls', ALL, ids=ids)
def test_a_flag_of_one_stage_wins_over_that_of_all(cls):
    stages = [f.name for f in dataclasses.fields(cls) if isinstance(getattr(cls(), f.name), TrainSettings)]
    table = option_settings(cls, {'lr': .5, f'{stages[0]}_lr': .25, 'warmup': .2})
    assert [table[s]['learning_rate'] for s in stages] == [.25, .5] and all(table[s]['warmup'] == .2 for s in stages)


@pytest.mark.parametrize(
    'words, path, value',
    [
        (('--n-labelled', '1/4'), 'n_labelled', 0.25),
        (('--n-test', 'all'), 'n_test', None),
        (('--no-gradient-checkpointing',), 'sft.gradient_checkpointing', False),
        (('--leave-out', 'a, b'), 'leave_out', ('a', 'b')),
        (('--lora-rank', '2'), 'lora.rank', 2),
        (('--others', 'ceiling'), 'others', ('ceiling',)),
        (('--dpo-warmup', '.2'), 'dpo.warmup', 0.2),
    ],
)
def test_flags_reach_the_settings(words, path, value, monkeypatch):
    "From what is typed to the settings that would be run"
    seen = []
    monkeypatch.setattr('w2s.compare.plan.plan', lambda opens, config, out, keep: seen.append(config))
    data = ('--data', __file__) if path == 'leave_out' else ()
    assert w2s('preferences', *data, *words, '--dry-run').exit_code == 0
    found = seen[0]
    for name in path.split('.'): found = getattr(found, name)
    assert found == value


def test_help_does_not_load_pytorch():
    code = ("import sys\nsys.argv = ['w2s', 'run', 'preferences', '--help']\nfrom w2s.cli.app import main\ntry: main()\nexcept SystemExit: "
            "pass\nprint([n for n in ('torch', 'datasets', 'pandas', 'transformers') if n in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.splitlines()[-1] == '[]'


# Old names

OLD = {
    'preferences': (('--rows', 40, '--label-share', 0.25, '--test-rows', 6), (10, 30, 6)),
    'weak-teacher': (('--rows', 40), (20, 20, 200)),
    'safety': (('--rows', 660), (60, 600, 400)),
    'legal': (('--rows', 40), (13, 27, 400)),
    'persona': (('--gold-rows', 8, '--rows', 9, '--test-rows', 7), (8, 9, 7)),
    'toxicity': (('--gold-rows', 8, '--rows', 9, '--test-rows', 7), (8, 9, 7)),
}


@pytest.mark.parametrize('command', OLD)
def test_old_flags_do_what_they_did_and_say_the_new_ones(command):
    words, (few, many, test) = OLD[command]
    cls = {'persona': DemonstrationSettings, 'toxicity': Toxicity, 'safety': Classify, 'legal': Classify}.get(command, WeakTeacher)
    config = {**COMMANDS, 'weak-teacher': COMMANDS['preferences']}[command]
    table = {words[i][2:].replace('-', '_'): words[i + 1] for i in range(0, len(words), 2)}
    with pytest.warns(W2SWarning) as said: c = config(table)
    assert isinstance(c, cls) and (c.n_labelled, c.n_unlabelled, c.n_test) == (few, many, test)
    lines = [str(w.message) for w in said]
    assert all('is now' in line or 'are now' in line for line in lines) and all(any(word in line for line in lines) for word in words[::2])


@pytest.mark.parametrize(
    'cls, old, new',
    [
        (WeakTeacher, 'rows', 'n_labelled'),
        (WeakTeacher, 'label_share', 'n_unlabelled'),
        (Classify, 'test_rows', 'n_test'),
        (DemonstrationSettings, 'gold_rows', 'n_labelled'),
        (Toxicity, 'asked_rows', 'n_unlabelled'),
        (Toxicity, 'test_prompts', 'n_test'),
    ],
)
def test_an_old_and_a_new_name_together_are_refused(cls, old, new):
    with pytest.raises(ConfigError, match=f'(?s){old} is (?:the|an) old name.*{new}') as e:
        FILL[cls]({old: 0.5 if old == 'label_share' else 8, new: 8})
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('share', [.1, 1/3, .5])
def test_a_share_alone_is_a_share_of_what_there_is(share):
    "Of a file, nobody knows yet how much that is"
    with pytest.warns(W2SWarning): c = fill_settings(OWN[WeakTeacher] | dict(label_share=share))
    assert c.n_labelled == (None if share == .5 else share) and c.n_unlabelled is None


def test_flags_win_over_a_file_with_old_names(tmp_path):
    (tmp_path/'old.toml').write_text('rows = 40\nlabel_share = 0.25\ntest_rows = 6\n')
    with pytest.warns(W2SWarning): c = weak_teacher_config({'n_test': 9}, tmp_path/'old.toml')
    assert (c.n_labelled, c.n_unlabelled, c.n_test) == (10, 30, 9)
    with pytest.warns(W2SWarning): c = weak_teacher_config({'rows': 80}, tmp_path/'old.toml') # its share stays
    assert (c.n_labelled, c.n_unlabelled) == (20, 60)


def test_new_names_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for cls in ALL: FILL[cls](dict(n_labelled=12, n_unlabelled=20, n_test=8))


# Variations

VARY = [
    (WeakTeacher, 'n_labelled', '50,100,200', (50, 100, 200)),
    (WeakTeacher, 'sft.learning_rate', '1e-3,2e-3', (1e-3, 2e-3)),
    (WeakTeacher, 'dpo.epochs', '1,2', (1, 2)),
    (WeakTeacher, 'sft-lr', '1e-3,2e-3', (1e-3, 2e-3)),
    (Classify, 'n_labelled', '50,100', (50, 100)),
    (Classify, 'readout', 'head,words', ('head', 'words')),
    (Classify, 'methods', 'xent,confidence', (('xent',), ('confidence',))),
    (Classify, 'load.quantize', 'none,nf4', ('none', 'nf4')),
    (DemonstrationSettings, 'n_unlabelled', '50,100', (50, 100)),
    (DemonstrationSettings, 'examples', '2,4', (2, 4)),
    (DemonstrationSettings, 'method', 'naive,own-answers', (('naive',), ('own answers',))),
    (Toxicity, 'speak.samples', '2,4', (2, 4)),
    (Toxicity, 'greedy', 'true,false', (True, False)),
    (Toxicity, 'beta', '.1,1/2', (0.1, 0.5)),
]
PATH = {'sft-lr': 'sft.learning_rate', 'method': 'methods'}


@pytest.mark.parametrize('cls, setting, values, want', VARY, ids=ids)
def test_any_setting_can_be_varied(cls, setting, values, want):
    "By its name, its dotted name or its flag; values by the type of the field"
    found = []
    for c in variants({}, setting, values.split(','), cls).values():
        for name in PATH.get(setting, setting).split('.'): c = getattr(c, name)
        found.append(c)
    assert tuple(found) == want


@pytest.mark.parametrize('cls', ALL, ids=ids)
@pytest.mark.parametrize(
    'setting, values, told',
    [
        ('n_labeled', '1,2', 'did you mean'),
        ('seeds', '1,x', 'whole number'),
        ('seeds', '1', 'two or more'),
        ('seeds', '1,1', 'given twice'),
        ('seeds', '0,1', 'at least 1'),
        ('load', '1,2', 'setting'),
        ('max_length', '', 'name some'),
    ],
)
def test_a_wrong_variation_is_refused_before_anything_starts(cls, setting, values, told):
    with pytest.raises(ConfigError) as e: variants({}, setting, [v for v in values.split(',') if v], cls)
    assert told in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'kind, text, value',
    [
        (int | None, '12', 12),
        (int | float | None, '1/4', 0.25),
        (bool, 'no', False),
        (tuple[int, ...], '1, 2', (1, 2)),
        (tuple[str, ...], 'a,b(c=1,d=2)', ('a', 'b(c=1,d=2)')),
        (str | None, 'none', 'none'),
        (float | None, 'none', None),
    ],
)
def test_texts_become_values_by_type(kind, text, value): assert parse_text(text, kind, 'x') == value
