"""Other cases of the kinds of faults that were found: files of the user, links, odd bookkeeping, shapes, structures that were written as
text"""
import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.label_data import load_labels
from w2s.compare.label_settings import fill_labels
from w2s.compare.stages import HOLDER, MODELS, RUN, claim, lock, read_run
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.data.numbers import number_of
from w2s.data.prompts import looks_like_messages
from w2s.data.readers import read_preferences
from w2s.errors import ConfigError, DataError, ModelError
from w2s.evaluate.maths import mark_answer
from w2s.io.console import bullet_list, markdown_table, shorten_home
from w2s.io.disk import error_number
from w2s.io.manifests import publish
from w2s.models.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.organism.ladder import build_model, check_model_folder
from w2s.train.journal import read_line

# Files of the user

def test_files_of_the_user_below_our_folders_stay(tmp_path):
    "Not only at the top: a note among the adapters is a note"
    def write(folder):
        (folder/'adapters'/'a').mkdir(parents=True)
        (folder/'adapters'/'a'/'w.bin').write_bytes(b'w')
    publish(tmp_path, write, {})
    publish(tmp_path, write, {})
    (tmp_path/'adapters'/'notes.txt').write_text('mine')
    with pytest.raises(ConfigError, match='notes.txt is there, and it was not written by this command'): publish(tmp_path, write, {})
    assert (tmp_path/'adapters'/'notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('name', ['stages', 'store', 'gold'])
def test_no_folder_is_written_through_a_link(tmp_path, name):
    (tmp_path/'else').mkdir()
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/name).symlink_to(tmp_path/'else')
    with pytest.raises(ConfigError, match='symbolic link'), claim(tmp_path/'run', {}, quiet=True): pass


def test_scores_are_not_written_through_a_link(tmp_path):
    from datasets import Dataset

    from w2s.cli.toxicity import write_table
    (tmp_path/'keep.txt').write_text('precious')
    (tmp_path/'.writing-p.csv').symlink_to(tmp_path/'keep.txt')
    write_table(Dataset.from_dict(dict(text=['a'], toxicity=[.5])), tmp_path/'p.csv')
    assert (
        (tmp_path / 'keep.txt').read_text() == 'precious'
        and (tmp_path / 'p.csv').read_text() == 'text,toxicity\na,0.5\n'
        and not (tmp_path / 'p.csv').is_symlink()
    )


@pytest.mark.parametrize('how', ['a file', 'a link', 'beside ours'])
def test_a_model_is_not_built_over_files_of_the_user(tmp_path, how):
    folder = tmp_path/'pico'
    folder.mkdir()
    if how == 'a link': (folder/'README.md').symlink_to(tmp_path/'else')
    else: (folder/'card.json').write_text('{"mine": 1}')
    if how == 'beside ours': (folder/'SHA256SUMS').write_text('0 model.safetensors\n')
    with pytest.raises(ConfigError, match='was not written by this command'): build_model('pico', tmp_path, quiet=True)
    check_model_folder(tmp_path/'none')


@pytest.mark.parametrize('minutes', [float('nan'), float('inf'), -1., 0.])
def test_minutes_of_a_build_are_a_number(tmp_path, minutes):
    with pytest.raises(ConfigError, match='it must be a number above 0'): build_model('pico', tmp_path, minutes=minutes)


def test_a_home_behind_a_link_is_shortened(tmp_path, monkeypatch):
    (tmp_path/'real').mkdir()
    (tmp_path/'home').symlink_to(tmp_path/'real')
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    assert [shorten_home(f'{tmp_path}/{d}/model') for d in ('real', 'home', 'realm')] == ['~/model', '~/model', f'{tmp_path}/realm/model']


@pytest.mark.parametrize('end', ['\n', '\r', '\r\n', '\x0b', '\x0c', '\x85', '\u2028'])
def test_a_cell_is_one_line(end):
    assert len(markdown_table(['a'], [[f'x{end}y']]).splitlines()) == 3 and len(bullet_list([f'a{end}- b']).splitlines()) == 1


# Odd bookkeeping

@pytest.mark.parametrize('text', ['[]', '{}', '3', 'null', '{"stages": 5}', '"x"'])
def test_bookkeeping_of_another_shape_is_none(tmp_path, text):
    for name in (RUN, HOLDER, MODELS): (tmp_path/name).write_text(text)
    assert read_run(tmp_path) == {}
    held = lock(tmp_path)
    (tmp_path/HOLDER).write_text(text)
    with pytest.raises(ConfigError, match='another process is working'): lock(tmp_path)
    held.release()
    import hashlib
    assert (
        text == '{}'
        or text.startswith('{"')
        or read_line(text.encode() + b'\t' + hashlib.sha256(text.encode()).hexdigest()[:12].encode()) is None
    )


def test_memory_that_is_missing_is_named():
    import errno
    for said in ('libtorch_cpu.so: failed to map segment from shared object', 'std::bad_alloc', '[Errno 12] Cannot allocate memory'):
        assert error_number(ImportError(said)) == errno.ENOMEM


# Models

def folder_of(tmp_path, kind):
    folder = tiny_model(tmp_path/'m', ['Where does the fox live?', 'By the river.'])
    words = json.loads((folder/'config.json').read_text())['vocab_size']
    config = {
        'llama': LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            vocab_size=words,
        ),
        'gpt2': GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=words),
    }[kind]
    (folder/'model.safetensors').unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('quantize', ['nf4', 'none'])
@pytest.mark.parametrize(
    'kind, layer', [('llama', '0.mlp.down_proj'), ('llama', '1.self_attn.k_proj'), ('gpt2', '0.attn.c_attn'), ('gpt2', '1.mlp.c_fc')]
)
def test_a_tensor_of_another_shape_is_named_in_four_bits_too(tmp_path, kind, layer, quantize):
    "Packed, a transposed matrix passes for the right one"
    folder, load = folder_of(tmp_path, kind), LoadSettings(quantize, 'float32')
    load_base(folder, load, device='cpu')
    tensors = load_file(folder/'model.safetensors')
    (name,) = [k for k in tensors if f'{layer}.weight' in k]
    save_file(tensors | {name: tensors[name].T.contiguous()}, folder/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ModelError, match=f'in another shape, 1 tensor .*{layer}'): load_base(folder, load, device='cpu')


@pytest.mark.parametrize('index', ['null', '[]', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{}'])
def test_an_index_of_another_shape_is_damaged(tmp_path, index):
    folder = folder_of(tmp_path, 'llama')
    (folder/'model.safetensors.index.json').write_text(index)
    with pytest.raises(ModelError, match='index.json is damaged'): load_base(folder, LoadSettings('none', 'float32'), device='cpu')


def test_parts_without_an_index_are_named(tmp_path):
    folder = folder_of(tmp_path, 'llama')
    (folder/'model.safetensors').rename(folder/'model-00001-of-00002.safetensors')
    with pytest.raises(ModelError, match='neither model.safetensors nor model.safetensors.index.json'):
        load_base(folder, LoadSettings('none', 'float32'), device='cpu')


def test_an_adapter_with_nan_is_refused(tmp_path):
    base = load_base(folder_of(tmp_path, 'llama'), LoadSettings('none', 'float32'), device='cpu')
    adapter = add_adapter(base, LoraSettings(rank=2))
    saved = save_adapter(adapter, base, tmp_path/'a')
    adapter.unload()
    tensors = load_file(saved/'adapter_model.safetensors')
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float('nan')
    save_file(tensors, saved/'adapter_model.safetensors')
    (saved/'manifest.json').unlink()
    with pytest.raises(ModelError, match='holds inf or NaN'): load_adapter(base, saved)


# Rows

@pytest.mark.parametrize('spell', [str, json.dumps])
@pytest.mark.parametrize(
    'cell',
    [
        {'role': 'assistant', 'content': 'Yes'},
        {'content': 'Yes'},
        {'messages': [{'role': 'assistant', 'content': 'Yes'}]},
        [{'type': 'text', 'text': 'Yes'}],
    ],
)
def test_structures_written_as_text_are_not_trained_on(tmp_path, cell, spell):
    assert looks_like_messages(spell(cell))
    (tmp_path / 'x.jsonl').write_text(
        ''.join(
            json.dumps(dict(prompt=f'What is {i}?', chosen=spell(cell), rejected=spell(cell).replace('Yes', 'No'))) + '\n' for i in range(8)
        )
    )
    try: texts = [t for rows in read_preferences(tmp_path/'x.jsonl').splits.values() for t in rows['chosen']]
    except DataError as e: texts = [] if 'written as text' in str(e) else [str(e)]
    assert not any('{' in t for t in texts)


def test_words_in_braces_are_words():
    assert not any(map(looks_like_messages, ('{a} is a set.', "He said {'so'}.", '[1, 2]', '[a] and {b}')))


@pytest.mark.parametrize('few, many', [(1, 1), (2, 1), (1, 39)])
def test_too_few_rows_of_the_world_are_refused(few, many):
    from w2s.compare.models import know_model
    c = fill_labels(dict(data='world:safety', weak='pico', strong='pico', n_labelled=few, n_unlabelled=many, seeds=1))
    from w2s.compare.label_data import label_halves
    with pytest.raises(ConfigError, match='each needs two at least'):
        label_halves(c, load_labels(c, [know_model('pico', 'pico', c).reader]), 0)


@pytest.mark.parametrize('text', ['10^{3}', '4^2', '5!', '2 pi', '2pi', '3^2'])
def test_what_is_no_number_is_none(text): assert number_of(text) is None


@pytest.mark.parametrize(
    'gold, said, right',
    [
        ('10', r'The answer is $10\pi$.', False),
        ('10', 'A: 10x', False),
        ('10', r'#### 10\pi', False),
        ('3', r'The answer is 2\sqrt{3}.', False),
        ('3', 'The answer is (2, 3).', False),
        ('6', 'The answer is 5 or 6.', False),
        ('1024', 'The answer is 2^{10}.', True),
        ('9', r'\boxed{3^2}', True),
        ('3', r'\boxed{3^2}', False),
        ('120', r'\boxed{5!}', True),
        ('6', 'The answer is $10 - $4 = $6.', True),
        ('7', 'The answer is 3 + 4 = 7 apples.', True),
        ('10', 'The answer is that she has 10 apples left.', True),
        ('5', 'The answer is 5!', True),
    ],
)
def test_a_formula_is_not_its_last_number(gold, said, right): assert mark_answer(gold, said) == (right, True)


def test_the_oracle_is_for_the_world():
    assert fill_toxicity(dict(scorer='oracle')).scorer == ''
    with pytest.raises(ConfigError, match='for texts of the embedded world'): fill_toxicity(dict(scorer='oracle', data='x.jsonl'))


def test_a_size_that_is_unknown_names_all(tmp_path):
    done = CliRunner().invoke(app, ['zoo', 'build', '--size', 'tiny', '--out', str(tmp_path/'z')])
    assert done.exit_code == 1 and 'scholar' in str(done.exception) and not (tmp_path/'z').exists()


@pytest.mark.parametrize('name', ['system', 'System Prompt', 'sys_prompt', 'system-message', 'SYS PROMPT'])
def test_a_system_prompt_is_read_however_it_is_spelled(tmp_path, name):
    (tmp_path / 'x.jsonl').write_text(
        ''.join(
            json.dumps({name: f'Be {"kind" if i % 2 else "brief"}.', 'prompt': f'What is {i}?', 'chosen': 'Yes.', 'rejected': 'No.'}) + '\n'
            for i in range(8)
        )
    )
    prompts = [p for rows in read_preferences(tmp_path/'x.jsonl').splits.values() for p in rows['prompt']]
    assert all('Be ' in str(p) for p in prompts)


@pytest.mark.parametrize('share, stops', [(0., False), (.1, False), (.4, True)])
def test_a_column_of_which_a_part_is_long_is_long(tmp_path, share, stops):
    long = ' '.join(f'word{i}' for i in range(60))
    (tmp_path / 'x.jsonl').write_text(
        ''.join(
            json.dumps(dict(prompt=f'What is {i}?', chosen='Yes.', rejected='No.', notes=f'{long} {i}' if i < 40 * share else 'none given'))
            + '\n'
            for i in range(40)
        )
    )
    if not stops: read_preferences(tmp_path/'x.jsonl')
    else:
        with pytest.raises(DataError, match='notes'): read_preferences(tmp_path/'x.jsonl')


@pytest.mark.parametrize('card', [{'held_out': []}, {'held_out': {'all': 3}}])
def test_a_scorer_whose_card_has_another_shape_is_refused(tmp_path, card):
    from w2s.evaluate.toxicity_scorers import KIND, load_ridge, save_ridge, train_ridge
    texts = [f'you are {"vile" if i % 2 else "kind"} {i}' for i in range(60)]
    folder = save_ridge(train_ridge(texts, [float(i % 2) for i in range(60)]), tmp_path/'s')
    (folder/'manifest.json').unlink()
    (folder/'card.json').write_text(json.dumps({'kind': KIND, **card}))
    with pytest.raises(ModelError, match='does not say how it was measured'): load_ridge(folder)
