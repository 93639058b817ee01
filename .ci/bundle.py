"""Pack this commit and the wheels of all it needs into one archive for a machine without a network.

    python .ci/bundle.py dist/mlds.tar [--without torch torchvision] [--python 3.12] [--extra reproduce]

There: tar xf mlds.tar && cd mlds && sh install.sh, which asks no index. What is named in `without` is not packed, nor
what only it needs: the machine has it already, with a build for its GPUs.
"""
import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALL = """#!/bin/sh
# Makes .venv from the wheels beside this file; PYTHON=python3.12 chooses the interpreter.
set -e
cd "$(dirname "$0")"
${{PYTHON:-python3}} -m venv {site}.venv
.venv/bin/pip install --quiet --no-index --find-links wheels --editable '{package}'
touch .venv/.installed
echo "Ready: make reproduce PROFILE=smoke"
"""


def pip(*args):
    done = subprocess.run([sys.executable, '-m', 'pip', *args], capture_output=True, text=True)
    if done.returncode: sys.exit(f"pip {args[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout

def wanted(extra): return f'.[{extra}]' if extra else '.'

def target(python):
    "What pip has to be told about another Python."
    return ['--python-version', python, '--only-binary', ':all:'] if python else []

def resolved(extra, python):
    "Name -> what pip would install, from a trial run."
    with tempfile.TemporaryDirectory() as folder:
        report = f'{folder}/report.json'
        place = ['--target', folder] if python else []
        pip('install', '--dry-run', '--ignore-installed', '--quiet', '--report', report, *place, *target(python),
            wanted(extra), 'setuptools>=77', 'wheel')
        found = json.loads(Path(report).read_text())['install']
    return {canonicalize_name(f['metadata']['name']): f for f in found}

def wanted_by(item, extras, python):
    "Names, with extras, of what a package requires."
    environment = default_environment() | (dict(python_version=python, python_full_version=f'{python}.0') if python else {})
    for text in item['metadata'].get('requires_dist', []):
        need = Requirement(text)
        if any(not need.marker or need.marker.evaluate(environment | dict(extra=e)) for e in ['', *extras]):
            yield canonicalize_name(need.name), need.extras

def closure(found, extra, without, python):
    "Names that are needed if those in `without` are there already."
    names, left = set(), [('mlds', {extra}), ('setuptools', set()), ('wheel', set())]
    seen = set()
    while left:
        name, extras = left.pop()
        key = name, frozenset(extras)
        if name in without or name not in found or key in seen: continue
        seen.add(key)
        names.add(name)
        left += wanted_by(found[name], extras, python)
    return sorted(names - {'mlds'})

def pack(archive, folder, extra, without):
    "The checkout's last commit, the wheels and the script in one tar file."
    files = subprocess.run(['git', 'archive', '--format=tar', 'HEAD'], stdout=subprocess.PIPE, check=True).stdout
    (folder/'checkout.tar').write_bytes(files)
    with tarfile.open(folder/'checkout.tar') as t: t.extractall(folder/'mlds', filter='data')
    script = folder/'mlds/install.sh'
    script.write_text(INSTALL.format(package=wanted(extra), site='--system-site-packages ' if without else ''))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, 'w') as t:
        t.add(folder/'mlds', 'mlds')
        t.add(folder/'wheels', 'mlds/wheels')

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('archive', type=Path)
    p.add_argument('--without', nargs='*', default=[])
    p.add_argument('--python', default='')
    p.add_argument('--extra', default='reproduce')
    a = p.parse_args()
    without = {canonicalize_name(name) for name in a.without}
    found = resolved(a.extra, a.python)
    unknown = without - set(found)
    if unknown: sys.exit(f"--without {sorted(unknown)[0]}: nothing here needs it; the packages are {', '.join(sorted(found))}")
    pins = [f"{name}=={found[name]['metadata']['version']}" for name in closure(found, a.extra, without, a.python)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        how = ['download', '--dest'] if a.python else ['wheel', '--wheel-dir']
        pip(how[0], '--quiet', '--no-deps', *how[1:], str(folder/'wheels'), *target(a.python), *pins)
        pack(a.archive, folder, a.extra, without)
    size = a.archive.stat().st_size/1e6
    print(f"{a.archive}: {size:.0f} MB, {len(pins)} wheels. There: tar xf {a.archive.name} && sh mlds/install.sh")


if __name__ == '__main__': main()
