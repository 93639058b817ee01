"Write the file named on the command line: text and code of nbs/index.ipynb, with links that start one folder higher."
import sys
from pathlib import Path

import nbformat

shown = [c for c in nbformat.read('nbs/index.ipynb', 4).cells if not c.source.startswith('#| hide')]
parts = [c.source if c.cell_type == 'markdown' else '```python\n' + c.source.removeprefix('#| eval: false\n') + '\n```' for c in shown]
Path(sys.argv[1]).write_text('\n\n'.join(parts).replace('](../', '](') + '\n')
