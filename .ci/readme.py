"""Write the file named on the command line: nbs/index.ipynb as Markdown. With `numbers` behind it, bring the numbers up to date first;
with `stale`, name the notebooks whose numbers are not those of the tables, and write nothing."""
import re
import sys
from pathlib import Path

import nbformat

from mlds.study.numbers import number_functions, stale_notebooks


def shown(cell):
    "A cell as the README has it."
    text = cell.source.removeprefix('#| eval: false\n')
    return text if cell.cell_type == 'markdown' else f'```python\n{text}\n```'


if sys.argv[2:] == ['numbers']:
    for file in stale_notebooks('nbs', number_functions(), write=True): print(f'brought up to date: {file}')
if sys.argv[2:] == ['stale']:
    for file in stale_notebooks('nbs', number_functions()): print(f'  {file}: its numbers are not those of figures/')
    sys.exit()
cells = [c for c in nbformat.read('nbs/index.ipynb', 4).cells if not c.source.startswith('#| hide')]
text = re.sub(r'<!--.*?-->', '', '\n\n'.join(map(shown, cells)))  # marks are for notebooks
text = re.sub(r'\]\((?!http|\.\./)', '](nbs/', text).replace('](../', '](')  # links start one folder higher
Path(sys.argv[1]).write_text(text + '\n')
