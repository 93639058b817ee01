"A copy of the checkout, and the smoke profile made in it, for the tests of the whole."
import os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def call(*command, cwd=ROOT, timeout=300):
    "Run a command with this Python's programs and one torch thread; on a time limit all its children end too."
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {'PATH': path, 'PYTHONPATH': str(cwd), 'OMP_NUM_THREADS': '1',
                        'PYTHONWARNINGS': 'ignore', 'MAKEFLAGS': ''}
    p = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, text=True, start_new_session=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try: out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        out, err = p.communicate()
        pytest.fail(f"{' '.join(map(str, command))}: not finished after {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(command, p.returncode, out, err)

def make(*args, cwd, timeout=300):
    "`make` with the environment that is already there."
    done = call('make', '-s', '-o', 'install', *args, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def git_files(*options):
    "The paths that git lists."
    done = subprocess.run(['git', 'ls-files', '-z', *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip("needs git and a git checkout")
    return [Path(p) for p in done.stdout.split('\0') if p and (ROOT/p).is_file()]

def pytest_collection_modifyitems(items):
    "The file that takes longest comes first, so that two workers are done at about the same time."
    items.sort(key=lambda item: item.path.name != 'test_experiments.py')

@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    "The files that git has or would add, and nothing else."
    copy = tmp_path_factory.mktemp('checkout')
    for p in git_files('--cached', '--others', '--exclude-standard'):
        (copy/p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/p, copy/p)
    return copy

@pytest.fixture(scope='session')
def smoke(checkout):
    "The copy after `make reproduce PROFILE=smoke`, and what that printed."
    return checkout, make('reproduce', 'PROFILE=smoke', 'CORES=2', cwd=checkout, timeout=1800)
