"Two processes that share trainings, scoring and sampling, as torchrun starts them: what one process makes, and a sentence where one dies"
import os
import pickle
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from launched import ended, started
from typer.testing import CliRunner

from w2s.cli.app import app, main
from w2s.compare.comparison import check_elsewhere, run_experiment
from w2s.compare.config import read_toml
from w2s.compare.demonstration_settings import fill_transfer
from w2s.compare.extensions import JUDGES, judge_scores
from w2s.compare.label_settings import fill_classify
from w2s.compare.machines import Machines
from w2s.compare.preference_settings import fill_settings
from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ConfigError, TrainError
from w2s.experiments.demonstrations import open_demonstrations
from w2s.experiments.labels import open_labels
from w2s.experiments.preferences import run as run_preferences
from w2s.io.signals import Stopped
from w2s.models import devices
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.class_heads import add_class_adapter
from w2s.models.heads import add_reward_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.train import processes
from w2s.train.checkpoints import checkpoints, step_of, trainable
from w2s.train.class_head import class_logits, encode_texts, head_probs
from w2s.train.generate import respond
from w2s.train.labels import class_probs, encode_labels, label_objective
from w2s.train.loop import TrainSettings, material, preference_objective, sft_objective, train
from w2s.train.probe import last_hidden
from w2s.train.processes import all_processes, process_count, together
from w2s.train.reference import stored_logps
from w2s.train.rewards import response_rewards, reward_objective
from w2s.train.settings import GenerateSettings
from w2s.train.shares import step_seed
from w2s.train.tokens import encode_rows

FULL, RANK = LoadSettings('none', 'float32'), LoraSettings(rank=2)
# blocks of some rows, steps of six, and one row in the last one, so that a process has none
STEP = TrainSettings(epochs=2, batch_size=6, learning_rate=1e-3, checkpoint_every=2, token_budget=300)
ROWS, WORDS, SECONDS = 13, (' no', ' yes'), 30
WEIGHTS = [1., .5, 0., 2.]*3 + [1.]


class Work:
    "The rows and the model of all jobs"
    def __init__(self, home, load=FULL):
        self.home, self.base = home, load_base(home/'strong', load, device='cpu')
        data = sample_preferences(ROWS, seed=6)
        self.data, tokenizer = make_rows(data, 'preferences'), self.base.tokenizer
        self.pairs = encode_rows(tokenizer, self.data, ('chosen', 'rejected'), 256).rows
        self.texts, self.words = encode_texts(tokenizer, self.data, 256).rows, encode_labels(tokenizer, self.data, WORDS, 256).rows
        p = np.random.default_rng(0).uniform(.1, .9, ROWS)
        self.probs = np.stack([p, 1 - p], 1)

    def dpo(self, folder):
        reference = stored_logps(folder/'store', self.base, None, self.pairs, 300, quiet=True)
        return add_adapter(self.base, RANK, 1), preference_objective(self.pairs, reference, self.probs[:, 0], WEIGHTS)

    def sft(self, folder): return add_adapter(self.base, RANK, 1), sft_objective(self.pairs, WEIGHTS)
    def words_in_batch(self, folder):
        return add_adapter(self.base, RANK, 1), label_objective(self.words, self.probs, WEIGHTS, 'confidence')

    def class_head(self, folder):
        return add_class_adapter(self.base, RANK, 1), label_objective(self.texts, self.probs, WEIGHTS, forward=class_logits)

    def reward(self, folder): return add_reward_adapter(self.base, RANK, 1), reward_objective(self.pairs, self.probs[:, 0], WEIGHTS)


def weights_of(model): return {n: p.detach().clone().numpy() for n, p in trainable(model).items()}


KINDS = ('dpo', 'sft', 'words_in_batch', 'class_head', 'reward')


def learn(work, folder, kind, name=None, after=None, step=STEP):
    "The adapter and the curve of a training"
    model, goal = getattr(work, kind)(folder)
    try:
        curve = train(model, goal, step, folder/(name or kind), seed=3, quiet=True, after=after)
        return weights_of(model), curve
    finally: model.unload()


def read(work, folder):
    "Everything that is scored and sampled, with an adapter that is far from zero"
    base, out = work.base, {}
    for name, make in (('words', add_adapter), ('head', add_class_adapter), ('reward', add_reward_adapter)):
        model = make(base, RANK, 1)
        with torch.no_grad():
            for n, p in enumerate(trainable(model).values()): p.normal_(std=.3, generator=torch.Generator().manual_seed(n))
        if name == 'words': out |= {'probs': class_probs(model, work.words, 300, quiet=True), 'states': last_hidden(model, work.texts, 300)}
        elif name == 'head': out['head'] = head_probs(model, work.texts, 300, quiet=True)
        else: out['rewards'] = response_rewards(model, work.pairs, 300, quiet=True)
        if name == 'words':
            how = GenerateSettings(max_tokens=12, temperature=1., samples=2, token_budget=200)
            prompts = work.data['prompt'][:]
            out['texts'] = [[(r.text, r.tokens, r.ended) for r in row] for row in
                            respond(model, base.tokenizer, prompts, how, 5, ids=work.data['id'][:], journal=folder/'texts.jsonl')]
        model.unload()
    return out | {'stored': stored_logps(folder/'store', base, None, work.pairs, 300, quiet=True)}


def everything(home, folder):
    "All jobs whose results are to be those of one process"
    work = Work(home)
    found = {kind: learn(work, folder, kind) for kind in KINDS}
    return found | {'read': read(work, folder), 'again': read(work, folder)}


# What the processes run

def job_everything(home):
    with all_processes():
        assert process_count() == 2
        found = everything(home, home/'two')
        everywhere = together(lambda: {k: found[k][0] for k in KINDS}, 'adapters')
        found['same everywhere'] = all(np.array_equal(everywhere[0][k][n], everywhere[1][k][n]) for k in KINDS for n in everywhere[0][k])
        found |= job_stopped(home) | {'nan': job_nan(home), 'judge': job_judge(home)}
    if os.environ['RANK'] == '0': (home/'two.pkl').write_bytes(pickle.dumps(found))


def job_stopped(home):
    "A signal comes to the first process alone; then the same training again"
    work, taken = Work(home), []
    def stop(step):
        taken.append(step)
        if step == 3: os.kill(os.getpid(), signal.SIGTERM)
    try: learn(work, home/'two', 'sft', 'stopped', stop)
    except Stopped: taken.append('stopped')
    return {'said': together(lambda: taken, 'what was said'), 'steps': [step_of(c) for c in checkpoints(home/'two'/'stopped')],
            'resumed': learn(work, home/'two', 'sft', 'stopped')}


def job_nan(home):
    "A row whose loss is not finite: only one of the processes has it"
    work = Work(home)
    model, goal = work.sft(home/'two')
    def loss(logps, i): return goal.loss(logps, i) + torch.where(i == 4, torch.nan, 0.)
    try: train(model, replace(goal, loss=loss), STEP, home/'two'/'nan', seed=3, quiet=True)
    except TrainError as e: said = str(e)
    finally: model.unload()
    return goal.ids[4], together(lambda: said, 'what was said')


def job_judge(home):
    "A function of the user, which may cost money"
    asked = []
    JUDGES.add('short', lambda prompts, responses: asked.append(len(responses)) or [-float(len(r)) for r in responses])
    scores = judge_scores('short', ['a', 'b'], [' c', ' dd'])
    return together(lambda: scores, 'scores'), together(lambda: asked, 'asked')


def job_command(*words):
    "The command line"
    sys.argv = ['w2s', *map(str, words)]
    main()


# The tests

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('distributed')
    write_samples(home/'data', 80, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(80, seed=4)]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=2, seed=2)
    return home


@pytest.fixture(scope='module')
def two(home):
    "What two processes have made"
    codes = ended(started(job_everything, [home], home/'everything'))
    assert codes == [0, 0], [(home/f'everything-{n}').read_text()[-1500:] for n in range(2)]
    return pickle.loads((home/'two.pkl').read_bytes())


@pytest.fixture(scope='module')
def one(home):
    "What one process makes"
    torch.set_num_threads(1)
    return everything(home, home/'one')


@pytest.mark.parametrize('kind', KINDS)
def test_adapters_are_those_of_one_process(one, two, kind):
    (ours, curve), (plain, steps) = two[kind], one[kind]
    assert ours.keys() == plain.keys() and max(np.abs(plain[n]).max() for n in plain) > .01
    assert max(np.abs(ours[n] - plain[n]).max() for n in plain) < 1e-6
    for c in ('loss', 'value', 'grad_norm', 'learning_rate'): np.testing.assert_allclose(curve[c], steps[c], rtol=2e-5, atol=1e-7)
    assert len(curve) == 6 # the third step of each epoch has one row


def test_all_processes_have_the_same_adapters(two): assert two['same everywhere']


@pytest.mark.parametrize('read', ['read', 'again'])
def test_scores_and_texts_are_those_of_one_process(one, two, read):
    assert two[read]['texts'] == one[read]['texts'] and len({t for row in one[read]['texts'] for t in row}) > ROWS
    for name in ('probs', 'states', 'head', 'rewards', 'stored'):
        np.testing.assert_array_equal(two[read][name], one[read][name], err_msg=name)


def test_a_stopped_training_goes_on(two):
    "The signal came to one of them, both stopped after the same step, and the end has the same bits"
    assert two['said'] == [[1, 2, 3, 'stopped'], ['stopped']] # the others do not ask what is done after a step
    assert two['steps'] == [2, 3]
    for name, value in two['sft'][0].items(): np.testing.assert_array_equal(two['resumed'][0][name], value)
    pd.testing.assert_frame_equal(two['resumed'][1], two['sft'][1])


def test_an_error_of_one_process_is_that_of_all(two):
    row, said = two['nan']
    assert said[0] == said[1] and said[0].startswith('stopped at step') and 'the loss is nan in rows' in said[0] and row in said[0]


def test_the_first_process_asks_a_judge_for_all(two):
    scores, asked = two['judge']
    assert [list(s) for s in scores] == [[-2., -3.]]*2 and asked == [[2], []]


# A whole command: one process is shot, both end with a sentence, and the same command goes on to what one process makes

TOML = '''
data = "{home}/data"
weak = "{home}/weak"
strong = "{home}/strong"
n_labelled = 16
n_unlabelled = 16
n_test = 6
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2}}
sft = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
dpo = {{batch_size = 4, epochs = 2, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
'''


def command(home, out): return ['run', 'preferences', '--config', home/'run.toml', '--out', out]


def shoot(both, out):
    "Kill the second process while the student is trained by DPO and has a checkpoint"
    while all(p.is_alive() for p in both):
        if list((out/'stages').glob('.unfinished-student*dpo*/checkpoints/step-*')): return both[1].kill()
        time.sleep(.01)
    raise AssertionError('the run was over before')


@pytest.fixture(scope='module')
def runs(home):
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    both = started(job_command, command(home, home/'run'), home/'first')
    shoot(both, home/'run')
    shot = time.time()
    codes, said = ended(both, SECONDS), [(home/f'first-{n}').read_text() for n in range(2)]
    seconds = time.time() - shot
    kept = {p.parent.name: p.stat().st_mtime_ns for p in (home/'run/stages').glob('[!.]*/manifest.json')}
    again = ended(started(job_command, command(home, home/'run'), home/'second'))
    second = [(home/f'second-{n}').read_text() for n in range(2)]
    with redirect_stdout(StringIO()) as said_alone: result = run_preferences(fill_settings(read_toml(home/'run.toml')), home/'alone')
    return dict(codes=codes, seconds=seconds, said=said, kept=kept, again=again, second=second, alone=said_alone.getvalue(), result=result)


@pytest.mark.long
def test_a_command_whose_process_is_killed_says_one_sentence(runs):
    first, other = runs['said']
    assert runs['codes'] == [1, -signal.SIGKILL] and other == '' and runs['seconds'] < SECONDS
    errors = [line for line in first.splitlines() if line.startswith('error:')]
    assert len(errors) == 1 and 'another process of this command is gone' in errors[0] and 'Traceback' not in first
    assert first.splitlines()[-1] == errors[0]


def test_the_same_command_goes_on(runs, home):
    assert runs['again'] == [0, 0], runs['second'][0][-2000:]
    now = {p.parent.name: p.stat().st_mtime_ns for p in (home/'run/stages').glob('[!.]*/manifest.json')}
    assert len(runs['kept']) >= 3 and all(now[name] == t for name, t in runs['kept'].items()), 'a finished stage was made again'
    assert 'student-seed0-dpo: going on' in runs['second'][0] and runs['second'][1] == ''
    assert not list((home/'run/.locks').iterdir()) and not list((home/'run/stages').glob('.*'))


def test_a_whole_command_ends_as_in_one_process(runs, home):
    items, alone = pd.read_parquet(home/'run/items.parquet'), runs['result'].items
    keys = [c for c in alone.columns if c not in ('value', 'seconds')]
    assert len(alone) > 50
    pd.testing.assert_frame_equal(items[keys], alone[keys], check_dtype=False)
    # a margin is beta times a difference of log-probs, each of which is right to 1e-6 of itself
    far = 1e-6*alone.loc[alone['metric'].str.startswith('logp'), 'value'].abs().max()
    room = np.where(alone['metric'] == 'margin', 2*runs['result'].config.beta*far, 1e-6)
    apart = np.abs(items['value'].to_numpy() - alone['value'].to_numpy())
    assert (apart <= room + 1e-6*alone['value'].abs()).all(), apart.max()
    assert np.median(apart) < 1e-7


def test_the_first_process_alone_speaks(runs):
    "Every line of progress is there once"
    lines = [line for line in runs['second'][0].splitlines() if line.startswith('[')]
    assert lines and len(lines) == len(set(lines)) and len(lines) == sum(line.startswith('[') for line in runs['alone'].splitlines())


# Other kinds of feedback

SMALL = dict(load=dict(quantize='none', dtype='float32'), lora=dict(rank=2), weak='pico', strong='pico', seeds=1)
TAUGHT = dict(epochs=1, batch_size=8, learning_rate=1e-3)
FEEDBACK = {
    'labels': (fill_classify, open_labels, dict(n_labelled=12, n_unlabelled=12, n_test=6, supervisor=TAUGHT, student=TAUGHT, snapshots=2)),
    'demonstrations': (
        fill_transfer,
        open_demonstrations,
        dict(n_labelled=6, n_unlabelled=8, n_test=4, max_tokens=12, examples=2, demonstrate=TAUGHT, student=TAUGHT,
             methods=('naive', 'in-context')),
    ),
}


def result_of(kind, out):
    fill, open_comparison, given = FEEDBACK[kind]
    return run_experiment(open_comparison, fill(SMALL | given), out, quiet=True)


def job_feedback(kind, out):
    "A comparison in Python: every process has its result"
    items = result_of(kind, out).items
    items.to_parquet(f'{out}-{os.environ["RANK"]}.parquet')


@pytest.mark.cases(1)
@pytest.mark.parametrize('kind', FEEDBACK)
def test_other_kinds_of_feedback(kind, home):
    assert ended(started(job_feedback, [kind, home/kind], home/f'{kind}-log')) == [0, 0], (home/f'{kind}-log-0').read_text()[-1500:]
    plain = result_of(kind, home/f'{kind}-alone').items
    keys = [c for c in plain.columns if c not in ('value', 'seconds')]
    for n in range(2):
        items = pd.read_parquet(home/f'{kind}-{n}.parquet')
        pd.testing.assert_frame_equal(items[keys], plain[keys], check_dtype=False)
        np.testing.assert_allclose(items['value'], plain['value'], rtol=1e-5, atol=1e-5)


# What is refused, before the processes meet

TWO = {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}
RUN = ['run', 'preferences', '--weak', 'pico', '--strong', 'nano']
REFUSED = {
    '--devices': ([*RUN, '--devices', 'cpu,cpu'], {}, 'leave out one of the two'),
    '--processes': ([*RUN, '--processes', '2'], {}, 'leave out one of the two'),
    '--on ray': ([*RUN, '--on', 'ray'], {}, 'leave out one of the two'),
    '--vary with --devices': ([*RUN, '--vary', 'beta', '--devices', 'cpu,cpu'], {}, 'leave out one of the two'),
    '--worker': ([*RUN, '--worker'], {}, 'for one process'),
    '--dry-run': ([*RUN, '--dry-run'], {}, 'for one process'),
    'one device': ([*RUN, '--device', 'cuda:1'], {}, 'one device for all processes'),
    'another command': (['label', '--rows', 'x'], {}, 'for w2s run'),
    'a plan': (['plan', 'preferences'], {}, 'for w2s run'),
    'FSDP': (RUN, {'ACCELERATE_USE_FSDP': 'true'}, 'asks for FSDP'),
    'DeepSpeed': (RUN, {'ACCELERATE_USE_DEEPSPEED': 'true'}, 'asks for DeepSpeed'),
    'mixed precision': (RUN, {'ACCELERATE_MIXED_PRECISION': 'bf16'}, 'w2s the type by --dtype'),
    'a compiler': (RUN, {'ACCELERATE_DYNAMO_BACKEND': 'INDUCTOR'}, 'a compiler'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_shared_is_refused_in_words(case, tmp_path, monkeypatch):
    words, env, said = REFUSED[case]
    for name, value in {**TWO, **env}.items(): monkeypatch.setenv(name, value)
    out = [] if case in ('another command', 'a plan') else ['--out', str(tmp_path/'run')]
    done = CliRunner().invoke(app, [*words, *out])
    assert done.exit_code != 0 and said in f'{done.output}{done.exception}' and not (tmp_path/'run').exists()
    assert isinstance(done.exception, (ConfigError, SystemExit))


def test_a_training_that_is_not_shared_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    work = Work(home)
    model, goal = work.sft(tmp_path)
    with pytest.raises(ConfigError, match='all_processes'): train(model, goal, STEP, tmp_path/'training', quiet=True)
    model.unload()


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(devices, 'accelerator', lambda: 'cuda')
    monkeypatch.setattr(devices, 'count_devices', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert {str(devices.find_device(n)) for n in ('auto', 'cuda')} == {'cuda:1'} and str(devices.find_device('cuda:0')) == 'cuda:0'
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(ConfigError, match='launch as many processes as it has GPUs'): devices.find_device('auto')


def test_other_gpus_than_cuda_are_not_shared(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('w2s.compare.comparison.find_device', lambda name: torch.device('mps'))
    with pytest.raises(ConfigError, match='not on mps'): check_elsewhere(Machines(), LoadSettings())


def test_dropout_is_of_the_process(monkeypatch):
    "Two processes with the same masks would train on rows that move together, and another number of processes is another training"
    plain = [material(STEP, d) for d in (0., .1)]
    for number in (0, 1):
        monkeypatch.setattr(processes, '_JOINED', [processes.Joined(number, 2, None, None)])
        assert material(STEP, 0.) == plain[0] and material(STEP, .1) == plain[1] | {'processes': 2}
        assert (step_seed(3, 7) == 3*1_000_003 + 7) == (number == 0)
