"""A model by its name on the hub: the right files at the right revision, or one sentence that says what to do; with a hub made here, and no
network"""
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.models import know_model
from w2s.errors import ConfigError, ModelError, W2SWarning
from w2s.io import file_hashes
from w2s.models import hub
from w2s.models.adapters import add_adapter, save_adapter
from w2s.models.hub import hub_folder, network_error
from w2s.models.identity import identity
from w2s.models.load import LoadSettings, load_base, local_folder
from w2s.models.places import load_for
from w2s.models.tiny import tiny_tokenizer
from w2s.train.logprobs import check_model

FULL = LoadSettings('none', 'float32')
TEXTS = ['Where does the fox live?', 'The fox lives by the river.', 'Human: Assistant:']
INDEX = 'model.safetensors.index.json'


class Hub:
    "A hub in a folder: owner/name -> revision -> files; it answers as the client of the real one does, and fills a cache of the same form"
    def __init__(self, home, cache):
        self.home, self.cache, self.discussions, self.gated, self.online, self.fetched, self.asked = home, cache, {}, set(), True, [], []

    def put(self, name, revision, folder): return Path(shutil.copytree(folder, self.home/name/revision.replace('/', '_')))

    def place(self, name, revision):
        if not self.online: raise OfflineModeIsEnabled('no network')
        answer = SimpleNamespace(headers={}, status_code=404, request=SimpleNamespace(url='', method='GET', headers={}), url='')
        if not (self.home/name).is_dir(): raise RepositoryNotFoundError('401 Client Error.\nRepository Not Found for url', response=answer)
        folder = self.home/name/(revision or 'main').replace('/', '_')
        if not folder.is_dir(): raise RevisionNotFoundError('404', response=answer)
        return folder

    def model_info(self, name, revision=None):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in self.list_repo_files(name, revision)])

    def list_repo_files(self, name, revision=None):
        return sorted(f.relative_to(p).as_posix() for p in [self.place(name, revision)] for f in p.rglob('*') if f.is_file())

    def get_repo_discussions(self, name, **how):
        self.asked.append(name)
        return iter([SimpleNamespace(num=n, author=a, status=s, is_pull_request=True) for n, a, s in self.discussions.get(name, [])])

    def snapshot_download(self, name, revision=None, allow_patterns=()):
        folder = self.place(name, revision)
        if name in self.gated:
            raise GatedRepoError(
                '403 Client Error.\nYou are trying to access a gated repo.\nMake sure to have access to it',
                response=SimpleNamespace(headers={}, status_code=403, request=SimpleNamespace(url='', method='GET', headers={}), url=''),
            )
        home, commit = self.cache/repo_folder_name(repo_id=name, repo_type='model'), hashlib.sha1(str(folder).encode()).hexdigest()
        (ref := home/'refs'/(revision or 'main')).parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        for f in self.list_repo_files(name, revision):
            if not any(fnmatch.fnmatch(f, p) for p in allow_patterns): continue
            self.fetched.append(f)
            self._link(home, home/'snapshots'/commit/f, folder/f)
        return str(home/'snapshots'/commit)

    def _link(self, home, to, source):
        blob = home/'blobs'/hashlib.sha256(source.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists(): shutil.copy(source, blob)
        if not to.exists(): to.symlink_to(os.path.relpath(blob, to.parent))

    def hf_hub_download(self, name, file, revision=None): return str(Path(self.snapshot_download(name, revision, [file]))/file)


def opt(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=512,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=64,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def llama():
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "OPT in the forms in which it is on the hub"
    home, model, tok = tmp_path_factory.mktemp('made'), opt(), tiny_tokenizer(TEXTS*3)
    for name, more in dict(safe={}, shards=dict(max_shard_size='100KB')).items():
        model.save_pretrained(home/name, **more)
        tok.save_pretrained(home/name)
    shutil.copytree(home/'safe', home/'bin')
    torch.save(model.state_dict(), home/'bin'/'pytorch_model.bin')
    (home/'bin'/'model.safetensors').unlink()
    for f in ('tf_model.h5', 'flax_model.msgpack', 'README.md'): (home/'bin'/f).write_bytes(b'x')
    shutil.copytree(home/'bin', home/'both')
    shutil.copy(home/'safe'/'model.safetensors', home/'both')
    shutil.copytree(home/'shards', home/'mistral')
    for f in (
        'consolidated.safetensors',
        'onnx/model.onnx',
        'onnx/config.json',
        'original/params.json',
        'params.json',
        'modeling_own.py',
        'additional_chat_templates/tools.jinja',
        'pytorch_model.bin',
    ):
        (home/'mistral'/f).parent.mkdir(exist_ok=True)
        (home/'mistral'/f).write_text('{}')
    return home


@pytest.fixture
def site(tmp_path, monkeypatch):
    "A hub, an empty cache, and a home for hashes"
    one = Hub(tmp_path/'hub', tmp_path/'cache')
    for name in ('snapshot_download', 'hf_hub_download'): monkeypatch.setattr(hub, name, getattr(one, name))
    monkeypatch.setattr(hub, 'HfApi', lambda: one)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'home'))
    hub_folder.cache_clear()
    yield one
    hub_folder.cache_clear()


def weights(base): return torch.cat([p.flatten() for p in base.model.parameters()])


# Weights that are only proposed as safetensors

BOT = 'SFconvertbot'
PROPOSALS = {
    'the first that is open': ([(6, BOT, 'open')], 'refs/pr/6'),
    'among others': ([(2, 'somebody', 'open'), (3, BOT, 'closed'), (4, BOT, 'open'), (6, BOT, 'open')], 'refs/pr/6'),
    'of somebody': ([(6, 'somebody', 'open')], ''),
    'a name that is nearly the same': ([(6, 'SFconvertbot-', 'open')], ''),
    'closed': ([(6, BOT, 'closed')], ''),
    'merged': ([(6, BOT, 'merged')], ''),
    'without weights': ([(4, BOT, 'open')], ''),
    'none': ([], ''),
}


@pytest.mark.parametrize('form', ['safe', 'shards'])
@pytest.mark.parametrize('kind', PROPOSALS)
def test_weights_that_the_converter_has_proposed(site, made, kind, form):
    "A repository with a pickle alone: the converter's own open proposal is read, and nobody else's"
    found, revision = PROPOSALS[kind]
    site.put('facebook/opt-mini', 'main', made/'bin')
    site.put('facebook/opt-mini', 'refs/pr/4', made/'bin')
    site.put('facebook/opt-mini', 'refs/pr/6', made/form)
    site.discussions['facebook/opt-mini'] = found
    if not revision:
        with pytest.raises(
            ModelError,
            match=r'facebook/opt-mini has no weights in safetensors form, only pytorch_model.bin, .*SFconvertbot\) has proposed none; if '
                  r'you trust its origin, give --allow-pickle, or name a converted revision by --revision',
        ):
            load_base('facebook/opt-mini', FULL, device='cpu')
        assert not any(f.endswith('.bin') for f in site.fetched)
        return
    base = load_base('facebook/opt-mini', FULL, device='cpu')
    check_model(base)
    assert torch.equal(weights(base), weights(load_base(made/form, FULL, device='cpu')))
    assert (base.name, base.model.name_or_path, base.model.hub_revision) == ('facebook/opt-mini', 'facebook/opt-mini', revision)
    assert not any(f.endswith(('.bin', '.h5', '.msgpack', '.md')) for f in site.fetched)
    hub_folder.cache_clear()
    site.online = False # what was fetched is found without a network
    assert (
        hub_folder('facebook/opt-mini').revision == revision
        and load_base('facebook/opt-mini', FULL, device='cpu').fingerprint == base.fingerprint
    )


def test_the_pickle_is_read_where_it_is_allowed(site, made):
    site.put('facebook/opt-mini', 'main', made/'bin')
    pickle = LoadSettings('none', 'float32', allow_pickle=True)
    base = load_base('facebook/opt-mini', pickle, device='cpu')
    assert torch.equal(weights(base), weights(load_base(made/'safe', FULL, device='cpu'))) and not site.asked
    notes = know_model('weak', 'facebook/opt-mini', SimpleNamespace(load=pickle, max_length=64, lora=None)).notes
    assert any('pickle form, which can run any code (allow_pickle)' in n for n in notes) and any(
        'are those of commit' in n and '(main)' in n for n in notes
    )


@pytest.mark.parametrize('pickle', [False, True])
def test_safetensors_are_taken_where_there_are_both(site, made, pickle):
    "And the converter is not asked for"
    site.put('a/b', 'main', made/'both')
    load_base('a/b', LoadSettings('none', 'float32', allow_pickle=pickle), device='cpu')
    assert 'model.safetensors' in site.fetched and 'pytorch_model.bin' not in site.fetched and not site.asked


def test_only_the_files_of_the_model_are_fetched(site, made):
    site.put('mistralai/m', 'main', made/'mistral')
    folder = hub_folder('mistralai/m').folder
    names = {f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file()}
    assert {n for n in names if n.endswith('.safetensors')} == set(json.loads((made/'mistral'/INDEX).read_text())['weight_map'].values())
    assert names >= {'config.json', 'tokenizer.json', 'additional_chat_templates/tools.jinja', INDEX} and not names & {
        'consolidated.safetensors',
        'onnx/config.json',
        'onnx/model.onnx',
        'original/params.json',
        'modeling_own.py',
        'pytorch_model.bin',
    }
    assert 'modeling_own.py' in [f.name for f in hub_folder('mistralai/m', code=True).folder.iterdir()]


def test_what_is_not_read_is_no_part_of_what_a_model_is(site, made, tmp_path):
    "Weights that another program has fetched into the same folder"
    site.put('mistralai/m', 'main', made/'mistral')
    folder = local_folder('mistralai/m', FULL)
    before = identity(folder)
    for name in ('consolidated.safetensors', 'pytorch_model.bin', 'training_args.bin'): (folder/name).write_bytes(b'other')
    assert identity(folder) == before


def test_names_with_signs_of_patterns_are_names(site, made):
    for f in ('a[1].json', 'all?.json'):
        (site.put('a/b', 'main', made / 'safe') if not (site.home / 'a/b').exists() else site.home / 'a/b/main').joinpath(f).write_text(
            '{}'
        )
    hub_folder('a/b')
    assert {'a[1].json', 'all?.json'} <= set(site.fetched)


# Revisions

def test_each_model_has_its_revision(site, made, tmp_path):
    "By role; an adapter remembers that of its base; the key is the content"
    site.put('a/b', 'main', made/'safe')
    other = opt(1)
    other.save_pretrained(tmp_path/'other')
    tiny_tokenizer(TEXTS*3).save_pretrained(tmp_path/'other')
    site.put('a/b', 'v2', tmp_path/'other')
    config = SimpleNamespace(
        load=LoadSettings('none', 'float32', revision='strong=v2'), max_length=64, lora=None, weak=['a/b'], strong='a/b'
    )
    weak, strong = (know_model(role, 'a/b', config) for role in ('weak', 'strong'))
    assert weak.fingerprint != strong.fingerprint and (weak.load.revision, strong.load.revision) == (None, 'v2')
    by_name = know_model('b', 'a/b', SimpleNamespace(load=config.load, max_length=64, lora=None, strong=('x/y', 'a/b')))
    assert (by_name.load.revision, by_name.fingerprint) == ('v2', strong.fingerprint)
    base = load_base('a/b', strong.load, device='cpu')
    save_adapter(add_adapter(base), base, tmp_path/'adapter')
    said = json.loads((tmp_path/'adapter'/'adapter_config.json').read_text())
    assert (said['base_model_name_or_path'], said['revision']) == ('a/b', 'v2') and any('(v2)' in n for n in strong.notes)


@pytest.mark.parametrize(
    'text, words',
    [
        ('wek=main', 'did you mean "weak"'),
        ('weak=', 'a revision is missing'),
        ('a,b', 'two revisions'),
        ('strong=a,strong=b', 'two revisions'),
        (',', 'a revision is missing'),
    ],
)
def test_revisions_that_cannot_be(text, words):
    with pytest.raises(ConfigError, match=words): LoadSettings(revision=text)


@pytest.mark.parametrize('revision, role', [('main', 'weak'), ('weak=main', 'weak')])
def test_a_revision_of_a_folder_is_refused(made, revision, role):
    for name in (made/'safe', 'pico'):
        with pytest.raises(ConfigError, match='is no model of the hub, so it has no revisions'):
            load_for(LoadSettings(revision=revision), name, role)
    assert load_for(LoadSettings(revision='strong=main'), 'pico', 'weak').revision is None


# What cannot be had

def reply(code): return SimpleNamespace(headers={}, status_code=code, request=SimpleNamespace(url='', method='GET', headers={}), url='')


FAULTS = {
    'gated': (
        GatedRepoError('403 Client Error.\nYou are trying to access a gated repo.', response=reply(403)),
        [
            'meta/llama is gated, and you are not logged in',
            'accept its licence at https://huggingface.co/meta/llama',
            'hf auth login',
            'HF_TOKEN',
        ],
    ),
    'not there': (
        RepositoryNotFoundError('401 Client Error.\nRepository Not Found', response=reply(401)),
        [
            'neither a folder here nor a model that the hub shows you',
            'check the name at https://huggingface.co/meta/llama',
            'hf auth login',
        ],
    ),
    'revision': (
        RevisionNotFoundError('404', response=reply(404)),
        ['has no revision "v9"', 'https://huggingface.co/meta/llama/discussions'],
    ),
    'name': (HFValidationError('Repo id must be'), ['nor a name that a model on the hub can have']),
    'offline': (
        OfflineModeIsEnabled('Offline mode is enabled.'),
        ['HF_HUB_OFFLINE is set; unset it, or run hf download meta/llama --revision v9'],
    ),
    'down': (
        HfHubHTTPError('503 Server Error\nmore', response=reply(503)),
        ['the hub cannot be reached (503 Server Error)', 'check the network', 'hf download meta/llama --revision v9'],
    ),
    'no network': (network_error()('Name or service not known'), ['the hub cannot be reached (Name or service not known)']),
    'too slow': (TimeoutError('timed out'), ['the hub cannot be reached (timed out)']),
}


@pytest.mark.parametrize('kind', FAULTS)
def test_what_cannot_be_had_is_said_whole(site, monkeypatch, kind):
    error, words = FAULTS[kind]
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(site, 'model_info', fail)
    with pytest.raises(ModelError) as told: load_base('meta/llama', LoadSettings('none', 'float32', revision='v9'), device='cpu')
    assert all(w in str(told.value) for w in words) and '\n' not in str(told.value)


def test_without_a_network_it_is_said_at_once(monkeypatch):
    "The hub's own client, on a machine that knows no name of another"
    def unknown(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    hub_folder.cache_clear()
    start = time.monotonic()
    with pytest.raises(ModelError, match='the hub cannot be reached .*; check the network and give the same command again'):
        hub_folder('facebook/opt-none')
    assert time.monotonic() - start < 5


def test_a_gated_model_whose_names_are_public(site, made, monkeypatch):
    "The list of files is given, and the files are not; with a token, it is the account that has no access"
    site.put('meta/llama', 'main', made/'safe')
    site.gated.add('meta/llama')
    with pytest.raises(ModelError, match='is gated, and you are not logged in: accept its licence'): local_folder('meta/llama', FULL)
    monkeypatch.setattr('huggingface_hub.get_token', lambda: 'hf_x')
    with pytest.raises(ModelError, match='is gated, and the account of your token has no access yet: accept its licence'):
        local_folder('meta/llama', FULL)
    (home := site.cache/'models--meta--llama'/'refs').mkdir(parents=True)
    (home/'main').write_text('a'*40)
    (snapshot := home.parent/'snapshots'/('a'*40)).mkdir(parents=True)
    (snapshot/'config.json').write_text('{}') # the configuration alone was fetched once
    with pytest.raises(ModelError, match='is gated'): local_folder('meta/llama', FULL)


def test_a_full_disk_is_no_fault_of_the_hub(site, made, monkeypatch):
    site.put('a/b', 'main', made/'safe')
    def full(*args, **kwargs): raise OSError(28, 'No space left on device', 'x')
    monkeypatch.setattr(hub, 'snapshot_download', full)
    with pytest.raises(OSError, match='No space left'): hub_folder('a/b')


def test_without_a_network_the_cache_will_do(site, made):
    site.put('a/b', 'main', made/'shards')
    site.put('a/b', 'v2', made/'bin')
    first = hub_folder('a/b').folder
    hub_folder('a/b', 'v2', pickle=True)
    site.online = False
    hub_folder.cache_clear()
    assert hub_folder('a/b').folder == first and hub_folder('a/b', 'v2', pickle=True).folder != first
    with pytest.raises(
        ModelError, match=r'only pytorch_model.bin, which can run any code when it is read \(in the cache of the hub.*give --allow-pickle'
    ):
        hub_folder('a/b', 'v2')
    with pytest.raises(ModelError, match='neither a folder here nor in the cache of the hub on this machine'): hub_folder('a/c')


# Hashes of large files

def test_weights_are_hashed_once(site, made, monkeypatch):
    "And again when they change; a damaged download is still noticed, and a damaged file of hashes ignored"
    monkeypatch.setattr(file_hashes, 'LARGE', 1000)
    monkeypatch.setattr(file_hashes, 'SETTLED', -1.)
    site.put('a/b', 'main', made/'shards')
    folder, read = local_folder('a/b', FULL), []
    plain = file_hashes.file_hash
    monkeypatch.setattr(file_hashes, 'file_hash', lambda p: read.append(p.name) or plain(p))
    first = identity(folder)
    weights = {f.resolve().name for f in folder.glob('*.safetensors')}
    assert weights <= set(read)
    read.clear()
    assert identity(folder) == first and not weights & set(read)
    (site.cache.parent/'home'/'w2s'/'hashes.json').write_text('{"half')
    with pytest.warns(W2SWarning, match='hashes of large files .* cannot be read'): assert identity(folder) == first
    blob = sorted(folder.glob('*.safetensors'))[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b'!')
    with pytest.raises(ModelError, match='is damaged: its content is not what was downloaded'): identity(folder)


# As a new user types it

def rows(folder, n=24):
    "Conversations, as most public preference data are"
    folder.write_text(
        ''.join(
            json.dumps(
                dict(
                    chosen=[dict(role='user', content=f'Where does fox {i} live?'), dict(role='assistant', content=f'By river {i}.')],
                    rejected=[
                        dict(role='user', content=f'Where does fox {i} live?'),
                        dict(role='assistant', content=f'No idea about {i}.'),
                    ],
                )
            )
            + '\n'
            for i in range(n)
        )
    )
    return folder


@pytest.fixture
def typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path/'rows.jsonl')
    return lambda *words: CliRunner().invoke(app, ['run', 'preferences', '--data', 'rows.jsonl', *words])


def test_the_command_of_the_readme_with_names_of_the_hub(site, made, typed, tmp_path):
    "OPT as a pickle with a proposal, a Llama without a chat template, rows of messages: a whole run"
    site.put('facebook/opt-mini', 'main', made/'bin')
    site.put('facebook/opt-mini', 'refs/pr/6', made/'safe')
    site.discussions['facebook/opt-mini'] = [(6, BOT, 'open')]
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path/'llama')
    tiny_tokenizer(TEXTS*3).save_pretrained(tmp_path/'llama')
    site.put('meta/llama', 'main', tmp_path/'llama')
    words = ['--weak', 'facebook/opt-mini', '--strong', 'meta/llama', '--dtype', 'float32', '--out', 'out']
    plan = typed(*words, '--dry-run')
    assert (
        plan.exit_code == 0
        and 'opt-mini (weak): ' in plan.output
        and '(refs/pr/6): the main branch has weights in pickle form only' in plan.output
        and 'messages are written as plain paragraphs' in plan.output
    )
    site.online = False
    hub_folder.cache_clear()
    done = typed(*words)
    assert done.exit_code == 0, done.output
    report = (tmp_path/'out'/'report.md').read_text()
    assert 'refs/pr/6' in report and 'plain paragraphs' in report
    assert all(
        json.loads(f.read_text())['base_model_name_or_path'] in ('facebook/opt-mini', 'meta/llama')
        for f in (tmp_path / 'out').rglob('adapter_config.json')
    )


@pytest.mark.parametrize(
    'words, says',
    [
        (['--weak', 'facebook/opt-mini'], 'give --allow-pickle, or name a converted revision by --revision'),
        (['--weak', 'meta/gated'], 'accept its licence at https://huggingface.co/meta/gated, run hf auth login'),
        (['--weak', 'a/none'], 'neither a folder here nor a model that the hub shows you'),
        (['--weak', 'meta/open', '--revision', 'weak=v9'], 'has no revision "v9"'),
        (['--weak', 'meta/open', '--revision', 'v2'], 'pico is no model of the hub'),
    ],
)
def test_what_a_new_user_is_told(site, made, typed, words, says):
    for name, form in (('facebook/opt-mini', 'bin'), ('meta/gated', 'safe'), ('meta/open', 'safe')): site.put(name, 'main', made/form)
    site.put('meta/open', 'v2', made/'safe')
    site.gated.add('meta/gated')
    out = typed(*words, '--strong', 'pico', '--dry-run')
    assert isinstance(out.exception, (ModelError, ConfigError)) and says in str(out.exception), out.output


def test_a_pickle_by_its_flag(site, made, typed):
    site.put('facebook/opt-mini', 'main', made/'bin')
    out = typed('--weak', 'facebook/opt-mini', '--strong', 'pico', '--allow-pickle', '--dry-run')
    assert out.exit_code == 0 and 'pickle form, which can run any code' in out.output
