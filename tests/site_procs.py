"What the site does to a page beyond nbdev's own processors; named in settings.ini: procs"
import re

FENCE = re.compile(r'^```python\n.*?^```$', re.S | re.M)
LINK = re.compile(r'\[`([^`]*)`\]\(https?://[^)\s]*\)')


def plain_signatures(cell) -> None:
    "Undo the links that nbdev makes of backticks inside the code of a signature, where a browser shows them as raw Markdown"
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' not in data: continue
        text = data['text/markdown']
        plain = FENCE.sub(lambda m: LINK.sub(r'\1', m[0]), text if isinstance(text, str) else ''.join(text))
        data['text/markdown'] = plain.splitlines(keepends=True)
