"""Chat templates: one text for training and for asking, whatever a template does to a row; and a template that breaks or never ends costs a
sentence"""
import re
import sys
import time
from datetime import date, datetime

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from w2s.data.hygiene import DataReport
from w2s.errors import DataError
from w2s.train import bounds
from w2s.train.endings import end_ids
from w2s.train.generate import GenerateSettings, respond
from w2s.train.templates import chat_text, freeze_date, frozen_date, no_end, render, template_uses_date, turn_end
from w2s.train.tokens import encode, encode_rows, report_tokens

TOKENS = ['<pad>', '<s>', '</s>', '<unk>', '<|im_start|>', '<|im_end|>', '<turn>', '</turn>', '<think>', '</think>']
USER, REPLY = dict(role='user', content='how do bees live?'), 'in a hive.'
SYSTEM = dict(role='system', content='be kind.')
LONG = [USER, dict(role='assistant', content='together.'), dict(role='user', content='and cows?')]

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TRIMS = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}")
ALTERNATES = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content.strip() }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
BRACKETS = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] -%}{%- set rest = messages[1:] -%}{%- else -%}{%- "
    "set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{{ bos_token }}{%- for m in rest -%}{%- if m.role == 'user' -%}{{ '[INST] ' + (first + '\n\n"
    "' if loop.last and first else '') + m.content + '[/INST]' }}{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}"
)
THINKS = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages[::-1] -%}{%- if ns.last < 0 and m.role == 'user' -%}{%- set ns.last = "
    "messages|length - 1 - loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content -%}"
    "{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>' + '\n"
    "' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
RICH = (
    "{% macro turn(m) %}{{ '<turn>' ~ m.role|upper ~ ': ' ~ m.content|replace('\n"
    "', ' ') ~ '</turn>' }}{% endmacro %}{% set counts = {'n': messages|length} %}{% for m in messages %}"
    "{% if not m.content %}{% continue %}{% endif %}{% if loop.index > 6 %}{% break %}{% endif %}{{ turn(m) }}{% generation %}{{ '' }}{% "
    "endgeneration %}{{ {'at': loop.index, 'of': counts.n}|tojson }}{% endfor %}"
    "{{ '%s' % messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{% if "
    "add_generation_prompt %}<turn>{% endif %}"
)
DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}{{ 'Today: "
    "' + day + '\n' }}"
    + CHATML
)
PLAIN = ("{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}Bot: {{ m.content }}\n[done]\n"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}")
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
KINDS = {
    'chatml': CHATML,
    'trims': TRIMS,
    'alternates': ALTERNATES,
    'brackets': BRACKETS,
    'thinks': THINKS,
    'rich': RICH,
    'plain': PLAIN,
    'bare': BARE,
}


def reader(template, **special):
    "A tokenizer of letters"
    chars = [*TOKENS, *sorted(set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:?#/[]{}"|<>-'))]
    kind = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token='<unk>'))
    kind.pre_tokenizer, kind.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=kind, **dict(unk_token='<unk>', pad_token='<pad>', bos_token='<s>', eos_token='</s>') | special
    )
    tok.add_special_tokens({'additional_special_tokens': TOKENS[4:]})
    tok.chat_template = template
    return tok


@pytest.fixture(autouse=True)
def _same_day():
    day = frozen_date()
    yield
    freeze_date(day)


# Right templates are rendered as transformers renders them

@pytest.mark.parametrize(
    'talk',
    [[USER], [SYSTEM, USER], LONG, [SYSTEM, *LONG], [dict(role='user', content=' padded\n ')]],
    ids=['one', 'system', 'long', 'all', 'space'],
)
@pytest.mark.parametrize('kind', KINDS)
def test_the_same_text_as_transformers(kind, talk):
    tok = reader(KINDS[kind])
    if kind == 'alternates' and talk[0] is SYSTEM:
        with pytest.raises(DataError, match='no system turn here'): render(tok, talk)
        return
    for generation in (False, True):
        assert render(tok, talk, generation) == tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=generation)


# Wrong ones end soon

BAD = {
    'endless': '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    'endless text': '{% for i in range(99999) %}{% for j in range(99999) %}words and words{% endfor %}{% endfor %}',
    'loops on loops': '{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ c }}{% endfor %}{% endfor '
                      '%}{% endfor %}',
    'large': "{{ 'a'*5000000000 }}",
    'large list': '{{ [0]*3000000000 }}',
    'other side': "{{ 5000000000*'a' }}",
    'doubled': "{% set x = 'abcdefgh' %}" + '{% set x = x ~ x %}' * 40,
    'added': "{% set x = 'abcdefgh' %}" + '{% set x = x + x %}' * 40,
    'lists of lists': '{% set x = [1] %}' + '{% set x = [x, x] %}' * 40 + '{{ x }}',
    'dictionaries': '{% set x = {} %}' + "{% set x = {'a': x, 'b': x} %}" * 40 + '{{ x|tojson }}',
    'macro': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    'deep': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'recursive loop': '{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}',
    'wide': "{{ 'x'|center(9999999999) }}",
    'method': "{{ 'x'.ljust(9999999999) }}",
    'zeros': "{{ 'x'.zfill(9999999999) }}",
    'format': "{{ '%9999999999d' % 3 }}",
    'formatted': "{{ '{:>9999999999}'.format(3) }}",
    'filter': "{{ '%9999999999d'|format(3) }}",
    'power': '{{ 9**(9**9) }}',
    'power of powers': '{% set x = 9 %}' + '{% set x = x**9 %}' * 12,
    'shift by product': '{% set x = 10**1000 %}' + '{% set x = x*x %}' * 30,
    'replaced': "{% set x = 'a'*1000 %}{% for i in range(9) %}{% set x = x|replace('a', 'a'*1000) %}{% endfor %}"
    + "{% set x = x|replace('a', 'a'*1000) %}" * 5,
    'joined': "{{ range(99999)|join('a'*100000) }}",
    'namespace': "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    'indented': "{{ ('a\n'*100000)|indent(100000) }}",
    'json': "{{ ([[[[1]*99]*99]*99]*99)|tojson(indent=9999) }}",
    'tabs': "{{ ('\t'*100000).expandtabs(100000) }}",
    'batch': "{{ [1]|batch(9999999999, 'x')|list }}",
    'sorted again and again': '{% for i in range(99999) %}{{ range(99999)|sort|length }}{% endfor %}',
    'searched': "{% for i in range(99999) %}{{ ('a'*999999).count('b') }}{% endfor %}",
    'wrapped': "{% for i in range(99999) %}{{ ('a '*99999)|wordwrap(5)|length }}{% endfor %}",
    'summed': '{{ range(99999)|map("string")|sum(start="") }}',
    'translated': "{{ ('a'*1000000).translate({97: 'b'*1000000}) }}",
    'split': "{% for i in range(99999) %}{{ ('a '*999999).split()|length }}{% endfor %}",
    'in': "{% for i in range(99999) %}{{ 'b' in 'a'*999999 }}{% endfor %}",
    'known text searched': "{% set x = 'a'*1999999 %}{% for i in range(99999) %}{% for j in range(99999) %}{% if 'ab' in x %}{% endif %}{% "
                           "endfor %}{% endfor %}",
    'stripped': "{% set x = 'a'*999999 %}{{ ('b'*999999 ~ 'a')|trim(x ~ 'c') }}",
    'searched from behind': "{{ ('a'*1999999).rfind('b' ~ 'a'*99999) }}",
    'split from behind': "{{ ('a'*1999999).rsplit('b' ~ 'a'*99999) }}",
    'width in a width': "{{ '{:{}}'.format(3, 9999999999) }}",
    'width as text': "{{ '{:{w}}'.format(3, w='9999999999') }}",
    'star': "{{ '%*d' % (9999999999, 3) }}",
    'precision': "{{ '%.9999999999f' % 3 }}",
    'again and again': "{{ ('{0}'*9999).format('a'*99999) }}",
    'named again': "{{ ('%(a)s'*9999) % {'a': 'a'*99999} }}",
    'other order': "{{ ('a'*9999)|replace(new='b'*9999, old='a') }}",
    'batch by name': "{{ [1]|batch(fill_with='x', linecount=9999999999)|list }}",
    'indent by name': "{{ ('a\n'*9999)|indent(first=true, width=999999) }}",
    'rounded': '{{ 3|round(999999999) }}',
    'json with a text': "{{ [[1]*999]*99|tojson(indent='a'*999999) }}",
    'deep json': '{% set x = [1]*9999 %}' + '{% set x = [x] %}' * 300 + '{{ x|tojson(indent=9) }}',
    'varargs': '{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ f(60, 1) }}',
    'varargs compared': '{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ g(60, varargs) }}{% endif %}{% endmacro '
                        '%}{% macro g(n, x) %}{% if n %}{{ g(n - 1, x, varargs, varargs) }}{% else %}{{ x == varargs }}{% endif %}{% '
                        'endmacro %}{{ f(60, 1) }}',
    'names in names': '{% set n = namespace(a=1) %}'
    + '{% set n = namespace(a=n, b=n, c=n) %}' * 40
    + '{{ n }}{% if n %}{{ [0]*9999999999 }}{% endif %}',
    'cycles': "{% set x = [1] %}" + '{% set x = cycler(x, x).items %}' * 40 + '{{ x }}',
    'pieces': "{% set x = 'a'*1999999 %}" + '{% set x = x[:-1] %}' * 3000,
    'list of pieces': "{% set x = 'a'*1999999 %}{{ [" + 'x[1:], ' * 3000 + '] }}',
    'all joined': "{% set x = 'a'*1999999 %}{{ x" + ' ~ x' * 3000 + ' }}',
    'bytes': '{{ (1).to_bytes(9999999999) }}',
    'of bytes': "{{ 'a'.encode().ljust(9999999999) }}",
    'keys': "{{ {}.fromkeys('a'*9999999) }}",
    'lazy': "{% set x = 'a'*1999999 %}{{ range(99999)|map(attribute='no', default=x)|join }}",
    'lazy method': "{% set x = 'a'*1999999 %}{{ ''.join(range(99999)|map(attribute='no', default=x)) }}",
    'long division': '{% set x = 9**999999 %}{% set y = 7**499999 %}{% for i in range(9999) %}{% set z = x // y %}{% endfor %}',
    'too many blocks': '{% for i in range(9) %}' * 30 + '{{ i }}' + '{% endfor %}' * 30,
    'block': '{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}',
    'long body': '{% for i in range(99999) %}{% for j in range(99999) %}' + '{% set a = 1 %}' * 3000 + '{% endfor %}{% endfor %}',
    'a set block': "{% for i in range(99999) %}{% for j in range(99999) %}{% set x %}"
    + 'a' * 9999
    + "{% endset %}{% endfor %}{% endfor %}",
}


def stopped(code):
    "Seconds that it took to refuse a template"
    tok, start = reader(code), time.process_time()
    with pytest.raises(DataError, match='chat template') as told: render(tok, [USER])
    assert '\n' not in str(told.value) and len(str(told.value)) < 400
    return time.process_time() - start


@pytest.mark.parametrize('kind', ['endless', 'doubled', 'macro', 'sorted again and again', 'pieces'])
def test_a_template_that_does_not_end_is_stopped_in_seconds(kind): assert stopped(BAD[kind]) < 9


@pytest.mark.skipif(sys.platform == 'win32', reason='the memory of a process is read otherwise there')
def test_templates_that_do_not_end_are_stopped(monkeypatch):
    "By the count, not the clock, and without gigabytes; with a tenth of the bounds, to be quick"
    resource = pytest.importorskip('resource')
    def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
    monkeypatch.setattr(bounds, 'WORK', bounds.WORK//10)
    monkeypatch.setattr(bounds, 'LENGTH', bounds.LENGTH//10)
    before = memory()
    slow = {kind: seconds for kind, code in BAD.items() if (seconds := stopped(code.replace('999999', '199999'))) > 5}
    assert not slow and memory() - before < 400e6


# Those that break are rows refused

BREAKS = {
    'refuses': ("{{ raise_exception('never this') }}", 'never this'),
    'attribute': ('{{ messages[9].content.strip() }}', 'UndefinedError|no element|undefined'),
    'adds': ("{{ messages + 1 }}", 'TypeError'),
    'divides': ('{{ 1 // 0 }}', 'ZeroDivisionError'),
    'overflow': ('{{ 9.5**9999 }}', 'OverflowError'),
    'recursion': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'template'),
    'security': ('{{ messages.__class__.__mro__ }}', 'unsafe'),
    'changes': ('{{ messages.append(3) }}', 'not safely|unsafe'),
    'format': ("{{ '%d' % 'x' }}", 'TypeError'),
    'value': ("{{ 'x'.index('y') }}", 'ValueError'),
    'filter': ("{{ 3|join|nosuch }}", 'nosuch'),
    'includes': ("{% include 'other' %}", 'template'),
    'chance': ('{{ [1, 2]|random }}', 'at random'),
    'key': ("{{ '{x}'.format() }}", 'KeyError'),
    'unicode': ("{{ 'a'.encode('ascii').decode('utf-16') }}", 'UnicodeDecodeError|template'),
}


def rows(*prompts, reply=REPLY):
    return Dataset.from_list([dict(id=f'r{i}', prompt=p, completion=reply) for i, p in enumerate(prompts, 1)])


@pytest.mark.parametrize('kind', [k for k in BREAKS if k != 'filter'])
def test_what_breaks_on_a_row_refuses_that_row(kind):
    "The others are kept; the reason and the number of the row are in the data report"
    code, words = BREAKS[kind]
    tok = reader("{% if 'bees' in messages[0].content %}" + code + '{% endif %}' + CHATML)
    other = [dict(role='user', content='and cows?')]
    tokens = encode_rows(tok, rows(other, [USER], other), ('completion',), 512)
    assert [r.id for r in tokens.rows] == ['r1', 'r3'] and list(tokens.refused) == ['r2']
    reason = tokens.refused['r2']
    assert re.search(words, reason) and '\n' not in reason
    table = report_tokens(DataReport(), 'train', 'm', tokens, [], []).table
    line = table[table['check'] == reason].iloc[0]
    assert (line['rows'], line['action'], line['detail']) == (1, 'unusable', 'row 2')
    with pytest.raises(DataError, match='row 2: '): encode(tok, [other, [USER]], [REPLY]*2)


@pytest.mark.parametrize('template', ['{% for %}', '{{ 3|nosuch }}', '{{', '{% if x %}', "{% extends 'other' %}"])
def test_a_template_that_cannot_be_read(template):
    with pytest.raises(DataError, match='chat template cannot be used'): render(reader(template), [USER])
    assert encode_rows(reader(template), rows([USER], [USER]), ('completion',), 512).refused.keys() == {'r1', 'r2'}


# What a template does to a row is counted

def each(content):
    return (
        "{% for m in messages %}<turn>{{ m.role }} "
        + content
        + "</turn>{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"
    )


NOSYSTEM = ("{% for m in messages if m.role != 'system' %}<turn>{{ m.role }} "
            "{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}")
LASTTWO = ("{% for m in messages[-2:] %}<turn>{{ m.role }} "
           "{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}")
ORDER = ("{% for m in messages|sort(attribute='role', reverse=true) %}<turn>{{ m.role }} "
         "{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}")
JOINS = ("{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}<turn>{{ m.role }} {% else %}\n{% endif "
         "%}{{ m.content }}{% if loop.last or m.role != messages[loop.index0 + 1].role %}</turn>{% endif %}{% endfor %}{% if "
         "add_generation_prompt %}<turn>assistant {% endif %}")
PAD = [dict(role='user', content='how? ')]
DID = {
    'drops system': (NOSYSTEM, [SYSTEM, USER], REPLY, 'drops the system message'),
    'drops the first question': (LASTTWO, LONG, REPLY, 'drops the user message'),
    'strips the prompt': (each('{{ m.content|trim }}'), PAD, REPLY, 'strips white space of the prompt'),
    'strips the reply': (each('{{ m.content.strip() }}'), [USER], ' in a hive.\n', 'strips white space of the reply'),
    'changes the prompt': (each('{{ m.content|upper if m.role == "user" else m.content }}'), [USER], REPLY, 'changes the user message'),
    'changes the reply': (each('{{ m.content|upper if m.role == "assistant" else m.content }}'), [USER], REPLY, 'changes the reply'),
    'order': (ORDER, [*LONG], REPLY, 'changes the order'),
    'system behind': (BRACKETS, [SYSTEM, *LONG], REPLY, 'changes the order'),
    'merges': (JOINS, [USER, dict(role='user', content='say.')], REPLY, 'merges turns'),
    'nothing': (CHATML, [SYSTEM, *LONG], REPLY, ''),
    'nothing, either': (JOINS, [SYSTEM, *LONG], REPLY, ''),
    'space is left alone': (CHATML, PAD, ' in a hive.\n', ''),
}


@pytest.mark.parametrize('kind', DID)
def test_what_a_template_does_is_counted(kind):
    template, talk, reply, words = DID[kind]
    tokens = encode_rows(reader(template), rows(talk, talk, reply=reply), ('completion',), 512)
    notes = [n for n in tokens.found if words and words in n]
    assert len(tokens.rows) == 2 and len(notes) == (words != '') and len(tokens.found) >= len(notes)
    if not words: assert not [n for n in tokens.found if 'end token' not in n]
    else:
        assert tokens.found[notes[0]] == [1, 2]
        table = report_tokens(DataReport(), 'train', 'm', tokens, [], []).table
        assert table[table['check'] == notes[0]][['rows', 'action', 'detail']].values.tolist() == [[2, 'kept', 'all of them']]


LOSES = {
    'last turn': "{% for m in (messages[:-1] if messages[-1].role == 'assistant' else messages) %}<turn>{{ m.content }}</turn>{% endfor "
                 "%}{% if add_generation_prompt %}<turn>{% endif %}",
    'assistants': "{% for m in messages if m.role == 'user' %}<turn>{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt "
                  "%}<turn>{% endif %}",
    'another name': "{% for m in messages %}<turn>{{ m.content if m.role in ('user', 'bot') }}</turn>{% endfor %}{% if "
                    "add_generation_prompt %}<turn>{% endif %}",
    'all': 'Hello.',
    'nothing': '{# #} ',
}


@pytest.mark.parametrize('kind', LOSES)
def test_a_reply_that_is_lost_refuses_the_row(kind):
    tokens = encode_rows(reader(LOSES[kind]), rows([USER]), ('completion',), 512)
    assert not tokens.rows and 'loses the reply' in tokens.refused['r1'] and tokens.found[tokens.refused['r1']] == [1]


# The boundary is what inference shows

ANSWERED = ("{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\nAnswer: "
            "{{ m.content }}<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nAnswer: {% endif %}")
SHORTER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OTHERWISE = ("{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant "
             "(think first)\n{% endif %}")
CLOSED = CHATML.replace('assistant\n{% endif %}', 'assistant\n<think>\n\n</think>\n\n{% endif %}')
PUT = {
    'thinks': (THINKS, True),
    'closed thoughts': (CLOSED, True),
    'otherwise': (OTHERWISE, True),
    'chatml': (CHATML, False),
    'answer': (ANSWERED, False),
    'none': (SHORTER, False),
}


@pytest.mark.parametrize('reply', [REPLY, 'how do bees live?', 'a', '<think> in a hive.'])
@pytest.mark.parametrize('kind', PUT)
def test_training_begins_where_inference_ends(kind, reply):
    "The prompt of a row is what the model is asked with; the response is the reply, with the end of its turn"
    template, put = PUT[kind]
    tok = reader(template)
    tokens = encode_rows(tok, rows([USER], reply=reply), ('completion',), 512)
    sequence, = tokens.rows[0].sequences
    asked = tok(tok.apply_chat_template([USER], tokenize=False, add_generation_prompt=True), add_special_tokens=False)['input_ids']
    behind = render(tok, [USER, dict(role='assistant', content='ZZZ')]).rpartition('ZZZ')[2]
    assert list(sequence.ids[:sequence.start]) == asked or kind == 'none' and list(sequence.ids[:len(asked)]) == asked
    assert tok.decode(sequence.ids[len(asked):]) == ('<|im_start|>assistant\n' if kind == 'none' else '') + reply + behind
    assert (len([n for n in tokens.found if 'in front of a reply' in n]) == 1) is put


def test_a_pair_has_one_prompt():
    "Chosen and rejected begin at the same place, which inference shows"
    tok = reader(THINKS)
    data = Dataset.from_list([dict(id='a', prompt=[USER], chosen='in a hive.', rejected='in a house.')])
    one, = encode_rows(tok, data, ('chosen', 'rejected'), 512).rows
    asked = tok(render(tok, [USER], True), add_special_tokens=False)['input_ids']
    assert all(list(s.ids[:len(asked)]) == asked and s.start == len(asked) + len('in a h') - len('in a h') for s in one.sequences)


# Dates

@pytest.mark.parametrize(
    'template, uses',
    [
        (DATED, True),
        (CHATML, False),
        ("{{ strftime_now('%Y') }}", True),
        ("{% set x = 'strftime_now' %}", False),
        ('{# strftime_now #}', False),
        ('{% macro f() %}{{ strftime_now("%B") }}{% endmacro %}', True),
        (None, False),
    ],
)
def test_it_is_known_whether_a_template_asks_for_the_date(template, uses): assert template_uses_date(reader(template)) is uses


def test_the_date_stands_still(monkeypatch):
    "What is rendered on another day is the same, unless it is told the day"
    tok = reader(DATED)
    now = render(tok, [USER])
    assert frozen_date().strftime('%d %b %Y') in now

    class Later(datetime):
        @classmethod
        def now(cls, tz=None): return datetime(2099, 1, 2, tzinfo=tz)

    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Later)
    assert '02 Jan 2099' in tok.apply_chat_template([USER], tokenize=False) and render(tok, [USER]) == now
    freeze_date(date(2024, 2, 29))
    row, = encode_rows(tok, rows([USER]), ('completion',), 512).rows
    assert (
        '29 Feb 2024' in render(tok, [USER])
        and '29 Feb 2024' in tok.decode(row.sequences[0].ids)
        and '29 Feb 2024' in chat_text(tok, [USER], REPLY).whole
    )


# How a turn ends

ENDS = {
    'chatml': (CHATML, '<|im_end|>', ''),
    'trims': (TRIMS, '<|im_end|>', ''),
    'alternates': (ALTERNATES, '</turn>', ''),
    'brackets': (BRACKETS, '</s>', ''),
    'plain': (PLAIN, None, '[done]'),
    'bare': (BARE, None, ''),
    'text, then a token': (CHATML.replace('{{ m.content }}', '{{ m.content }} (over)'), '<|im_end|>', '(over)'),
}


@pytest.mark.parametrize('kind', ENDS)
def test_a_turn_ends_as_its_template_ends_it(kind):
    template, token, stop = ENDS[kind]
    tok = reader(template)
    end = turn_end(tok)
    assert (end.token, end.stop) == (token and tok.convert_tokens_to_ids(token), stop)
    says = no_end(tok, chat=True)
    assert (says == '') is (token is not None) and (repr(stop) in says) is (token is None and stop != '')
    found = encode_rows(tok, rows([USER], [USER]), ('completion',), 512).found
    assert [n for n in found if 'end token' in n] == ([says] if says else [])


def test_text_without_an_end_token_is_said():
    found = encode_rows(reader(None, eos_token=None), rows('how do bees live? '), ('completion',), 512).found
    assert [n for n in found if 'no end token is learned: the tokenizer has none' in n]


def parrot(tok, text):
    "A model that says a text, letter by letter, whatever is in front of the letter, and then for ever its last one"
    torch.manual_seed(0)
    ids = tok(text, add_special_tokens=False)['input_ids']
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=2 * len(tok),
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
        model.model.norm.weight.fill_(1.)
        model.model.embed_tokens.weight.copy_(torch.eye(len(tok), 2*len(tok)))
        for a, b in zip(ids, [*ids[1:], ids[-1]], strict=True): model.lm_head.weight[b, a] = 1.
    return model


@pytest.mark.parametrize(
    'kind, said, want',
    [('chatml', 'xyz<|im_end|>q', 'yz'), ('plain', 'xyz\n[done]q', 'yz'), ('text, then a token', 'xyz (over)<|im_end|>', 'yz')],
)
def test_an_answer_to_a_chat_prompt_ends_where_its_turn_ends(kind, said, want):
    "A base model whose configuration knows only `</s>`, tuned on a template that ends turns otherwise"
    tok = reader(
        ENDS[kind][0].replace("assistant\n{% endif %}", "assistant\nx{% endif %}").replace("Bot: {% endif %}", "Bot: x{% endif %}")
    )
    model = parrot(tok, said)
    answer = respond(model, tok, [[USER]], GenerateSettings(max_tokens=30, temperature=0), quiet=True)[0][0]
    assert answer.ended and answer.text.strip() == want


def test_end_tokens_that_nobody_meant_are_not_ends():
    "A configuration's end id that is a letter in this vocabulary"
    tok = reader(CHATML)
    model = parrot(tok, 'abc')
    model.generation_config.eos_token_id = [2, tok.convert_tokens_to_ids('b')]
    assert end_ids(model, tok) == {2, tok.convert_tokens_to_ids('<|im_end|>')}
