"What a notebook cannot show about `mlds.study.runs` and the jobs of `mlds.study.plan`: killed processes, full disks."
import json, os, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, pytest
from hypothesis import given, strategies as st

from mlds.files import atomic_file
from mlds.study.plan import finished_runs, write_plan
from mlds.study.runs import Run, read_run, run_id

MANIFEST = {'files': 1, 'bytes': 1, 'sha256': 'c0ffee'}


def child(code, **kwargs):
    "A Python process in a group of its own, which says something and then waits to be killed."
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
                            start_new_session=True, **kwargs)


def test_killed_while_writing_keeps_the_earlier_file(tmp_path):
    p = child(f'''
        import os, time
        from mlds.study.runs import Run
        run = Run({str(tmp_path)!r}, 'train', {{'masks': 3}}, {MANIFEST}).start()
        run.save_text('score.txt', '1')
        def hang(fd): print('writing', flush=True); time.sleep(60)
        os.fsync = hang
        run.save_text('score.txt', '2')''')
    assert p.stdout.readline() == 'writing\n'
    run = Run(tmp_path, 'train', {'masks': 3}, MANIFEST)
    assert list(run.work.glob('.*.tmp'))
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert (run.work/'score.txt').read_text() == '1'
    assert not run.finished
    run.start()
    assert not list(run.work.glob('.*.tmp'))
    run.finish({'iou': .5})
    assert read_run(run.path)['metrics'] == {'iou': .5}


def test_a_worker_does_not_keep_the_lock(tmp_path):
    "Killed alone, a training leaves its data workers behind for some seconds; the run is free at once all the same."
    p = child(f'''
        import os, time
        from mlds.study.runs import Run
        Run({str(tmp_path)!r}, 'train', {{}}, {MANIFEST}).start()
        if not os.fork(): print('worker', flush=True)
        time.sleep(60)''')
    assert p.stdout.readline() == 'worker\n'
    with pytest.raises(RuntimeError, match=f'in use by process {p.pid}'): Run(tmp_path, 'train', {}, MANIFEST).start()
    p.kill(); p.wait()
    try: Run(tmp_path, 'train', {}, MANIFEST).start()
    finally: os.killpg(p.pid, signal.SIGKILL)


def test_one_of_two_that_start_together_wins(tmp_path):
    code = f'''
        import time
        from mlds.study.runs import Run
        try: Run({str(tmp_path)!r}, 'train', {{}}, {MANIFEST}).start(); print('won', flush=True); time.sleep(60)
        except RuntimeError as e: print('lost', 'in use by' in str(e), flush=True)'''
    both = [child(code) for _ in range(2)]
    try: assert sorted(p.stdout.readline() for p in both) == ['lost True\n', 'won\n']
    finally:
        for p in both: os.killpg(p.pid, signal.SIGKILL); p.wait()


def test_full_disk(tmp_path):
    "A file system of 64 kB, as only a namespace of its own may mount it."
    code = textwrap.dedent(f'''
        from mlds.study.runs import Run
        first = Run('full', 'train', {{'seed': 0}}, {MANIFEST}).start(); first.finish({{'iou': .5}})
        run = Run('full', 'train', {{'seed': 1}}, {MANIFEST}).start()
        run.save_bytes('checkpoint.pt', b'1' * 8192)
        try: run.save_bytes('checkpoint.pt', b'2' * 200_000)
        except OSError as e: print(e)
        assert (run.work/'checkpoint.pt').read_bytes() == b'1' * 8192
        assert not list(run.work.glob('.*.tmp'))
        assert first.finished and not run.finished
        (run.work/'checkpoint.pt').unlink()
        run.finish({{'iou': .6}})
        print('finished:', run.finished)''')
    (tmp_path/'full').mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs full && exec {sys.executable} -c "$CODE"'
    mount = ['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', tmp_path/'full']
    can = shutil.which('unshare') and subprocess.run(mount, capture_output=True).returncode == 0
    if not can: pytest.skip('mounting in a user namespace is not allowed here')
    done = subprocess.run(['unshare', '-rm', 'sh', '-c', script], cwd=tmp_path, env=os.environ | {'CODE': code},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'no space to write' in done.stdout and 'checkpoint.pt' in done.stdout and 'MiB free' in done.stdout
    assert 'finished: True' in done.stdout


# An experiment that adds random numbers, one a step, and can go on from any step.

PARAMETERS = """
seed = 0  # seed of the numbers
steps = 8  # numbers to add; [1, inf)
pause = 0.  # seconds before each; [0, 10]
runs = 'runs'  # folder of the runs"""
START = """
import json, os, random, time
from mlds.study.parameters import read_parameters
from mlds.study.runs import Run
params = read_parameters({file!r}, globals())
run = Run(runs, {file!r}, {{k: v for k, v in params.items() if k != 'pause'}}, {{}}).start()
run.save_text('pid', str(os.getpid()))"""
ADD = """
file, rng = run.work/'checkpoint.json', random.Random(seed)
state = json.loads(file.read_text()) if file.exists() else dict(step=0, sum=0, rng=rng.getstate(), done=0)
for step in range(state['step'], steps):
    time.sleep(pause)
    version, numbers, gauss = state['rng']
    rng.setstate((version, tuple(numbers), gauss))
    total = state['sum'] + rng.random()
    state = dict(step=step + 1, sum=total, rng=rng.getstate(), done=state['done'] + 1)
    run.save_text('checkpoint.json', json.dumps(state))"""
FINISH = """
file.unlink()
run.finish(dict(sum=state['sum'], done=state['done']))"""

@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
    "Its notebook."
    file = tmp_path_factory.mktemp('notebooks')/'adding.ipynb'
    cells = [nbformat.v4.new_code_cell(c.strip()) for c in (PARAMETERS, START.format(file=str(file)), ADD, FINISH)]
    cells[0].metadata.tags = ['parameters']
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), file)
    return file

def job_of(experiment, root, seeds=(0, 1, 2), pause=0.):
    "The plan of a job, and its file."
    runs = {}
    for s in seeds:
        params = dict(seed=s, steps=8, pause=pause, runs=str(root))
        name = run_id(str(experiment), {k: v for k, v in params.items() if k != 'pause'}, {})
        runs[name] = dict(notebook=str(experiment), params=params, needs=[])
    plan = dict(name='adding', root=str(root), cells=[], runs=runs, jobs={'job': list(runs)})
    return plan, write_plan(plan)

def begin(file, **kwargs):
    code = f"from mlds.study.plan import run_job; run_job({str(file)!r}, 'job')"
    return child(code, stderr=subprocess.PIPE, **kwargs)

def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f'{what}: not within {seconds} s'
        time.sleep(.05)

def alive(pid):
    try: return 'Z' not in Path(f'/proc/{pid}/stat').read_text().split(') ')[1][:1]
    except FileNotFoundError: return False

def results(plan): return {name: read_run(Path(plan['root'])/name)['metrics'] for name in plan['runs']}

@pytest.fixture(scope='module')
def quiet(experiment, tmp_path_factory):
    "The results of a job that nothing disturbs."
    plan, file = job_of(experiment, folder := tmp_path_factory.mktemp('quiet'))
    assert begin(file).wait() == 0
    assert all((folder/'logs'/f'{name}.ipynb').exists() for name in plan['runs'])
    return results(plan)


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
@pytest.mark.parametrize('victim', ['kernel', 'process', 'group'])
def test_a_killed_job_goes_on(experiment, quiet, tmp_path, victim):
    "The finished run stays as it is, the half-done one goes on where it was, and the numbers are those of a quiet day."
    plan, file = job_of(experiment, tmp_path/'killed', pause=.2)
    first, second, third = (tmp_path/'killed'/name for name in plan['runs'])
    p = begin(file)
    checkpoint = second.with_suffix('.partial')/'checkpoint.json'
    wait_for(lambda: checkpoint.exists() and json.loads(checkpoint.read_text())['step'] >= 3, 'three steps')
    kernel = int((second.with_suffix('.partial')/'pid').read_text())
    if victim == 'group': os.killpg(p.pid, signal.SIGKILL)
    os.kill(kernel if victim == 'kernel' else p.pid, signal.SIGKILL)
    out, err = p.communicate()
    assert p.returncode != 0 and out.startswith('[1/3] ') and len(out.splitlines()) == 1
    if victim == 'kernel': assert 'Kernel died' in err or 'DeadKernel' in err
    wait_for(lambda: not alive(kernel), 'the end of the kernel')
    assert finished_runs(plan) == [first.name]
    before = {f: f.stat().st_mtime_ns for f in first.iterdir()}
    assert begin(job_of(experiment, tmp_path/'killed')[1]).wait() == 0
    assert {f: f.stat().st_mtime_ns for f in first.iterdir()} == before
    assert results(plan) == quiet, 'each step was done once'
    assert not list((tmp_path/'killed').glob('*.partial'))


def test_a_run_does_not_see_the_one_before(experiment, quiet, tmp_path):
    "Alone or third in a job, a run gives the same numbers."
    alone, file = job_of(experiment, tmp_path/'alone', seeds=[2])
    assert begin(file).wait() == 0
    assert results(alone).items() <= quiet.items()


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
names = st.text().filter(lambda k: k not in ('runs', 'profile', 'data'))
params = st.dictionaries(names, scalars | st.lists(scalars), max_size=5)

@given(params)
def test_run_id_survives_json_and_order(p):
    again = json.loads(json.dumps(dict(reversed(p.items()))))
    assert run_id('train', again, MANIFEST) == run_id('train', p, MANIFEST)


@given(params, params)
def test_run_id_tells_parameters_apart(p, q):
    same = repr(sorted(p.items(), key=repr)) == repr(sorted(q.items(), key=repr))
    if same: assert run_id('train', p, MANIFEST) == run_id('train', q, MANIFEST)
    elif p != q: assert run_id('train', p, MANIFEST) != run_id('train', q, MANIFEST)


def test_atomic_file_under_concurrent_readers(tmp_path):
    "A reader sees one whole version or the other, never a mixture."
    file = tmp_path/'metrics.json'
    versions = {b'a' * 100_000, b'b' * 100_000}
    with atomic_file(file) as f: f.write(b'a' * 100_000)
    p = child(f'''
        from mlds.files import atomic_file
        print('go', flush=True)
        while True:
            for c in (b'a', b'b'):
                with atomic_file({str(file)!r}) as f: f.write(c * 100_000)''')
    assert p.stdout.readline() == 'go\n'
    try: seen = {file.read_bytes() for _ in range(2000)}
    finally: os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert seen <= versions
