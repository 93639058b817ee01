"""Build what would be published and try it: `python .ci/release.py DIST`

Both archives pass `twine check`, and the wheel, installed into an empty folder, runs the README's ten lines there.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(*command, python=sys.executable, cwd=ROOT, **env):
    "What a program of a Python says; its errors end this one."
    done = subprocess.run([str(python), *map(str, command)], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}"[-3000:])
    return done.stdout


def build(to):
    "The wheel; both archives are in the folder, which must not hold others."
    if to.exists() and any(to.glob('mlds-*')): sys.exit(f'{to} holds archives already: move them away')
    with tempfile.TemporaryDirectory() as tools: # twine and Snakemake want different versions of packaging
        call('-m', 'venv', tools)
        python = Path(tools)/'bin/python'
        call('-m', 'pip', 'install', '--quiet', 'build>=1.2', 'twine>=6.0', python=python)
        call('-m', 'build', '--outdir', to, python=python)
        call('-m', 'twine', 'check', '--strict', *sorted(to.glob('mlds-*')), python=python)
    wheel, = to.glob('mlds-*.whl')
    return wheel


def try_lines(wheel):
    "What the README's ten lines print where there is nothing but the wheel and the packages that it needs."
    code, = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), flags=re.S)
    with tempfile.TemporaryDirectory() as folder:
        site, empty = Path(folder)/'site', Path(folder)/'empty'
        empty.mkdir()
        call('-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel)
        where = f"import mlds; assert mlds.__file__.startswith({str(site)!r}), mlds.__file__\n"
        (empty/'lines.py').write_text(where + code)
        return call('lines.py', cwd=empty, PYTHONPATH=str(site))


if __name__ == '__main__':
    wheel = build(Path(sys.argv[1]).resolve())
    print(try_lines(wheel))
    print(f'{wheel.name} and its sdist are in {wheel.parent.name}/, checked; the ten lines ran from the wheel')
