"What a notebook cannot show about `mlds.study.runs`: killed processes, full disks, papermill itself."
import os, shutil, signal, subprocess, sys, textwrap
from pathlib import Path

import nbformat, papermill, pytest
from hypothesis import given, strategies as st

from mlds.study.runs import Run, atomic_file, load_runs, run_id

MANIFEST = {'files': 1, 'bytes': 1, 'sha256': 'c0ffee'}


def child(code, **kwargs):
    "A Python process in a group of its own, which says something and then waits to be killed."
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
                            start_new_session=True, **kwargs)


def test_killed_while_writing_keeps_the_earlier_file(tmp_path):
    p = child(f'''
        import os, time
        from mlds.study.runs import Run
        run = Run({str(tmp_path)!r}, {{'masks': 3}}, {MANIFEST}).start()
        run.save_json('score.json', 1)
        def hang(fd): print('writing', flush=True); time.sleep(60)
        os.fsync = hang
        run.save_json('score.json', 2)''')
    assert p.stdout.readline() == 'writing\n'
    run = Run(tmp_path, {'masks': 3}, MANIFEST)
    assert list(run.work.glob('.*.tmp'))
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert (run.work/'score.json').read_text().strip() == '1'
    assert not run.finished and load_runs(tmp_path) == []
    run.start()
    assert not list(run.work.glob('.*.tmp'))
    run.finish({'iou': .5})
    assert load_runs(tmp_path)[0]['metrics'] == {'iou': .5}


def test_a_worker_does_not_keep_the_lock(tmp_path):
    "Killed alone, a training leaves its data workers behind for some seconds; the run is free at once all the same."
    p = child(f'''
        import os, time
        from mlds.study.runs import Run
        Run({str(tmp_path)!r}, {{}}, {MANIFEST}).start()
        if not os.fork(): print('worker', flush=True)
        time.sleep(60)''')
    assert p.stdout.readline() == 'worker\n'
    with pytest.raises(RuntimeError, match=f'in use by process {p.pid}'): Run(tmp_path, {}, MANIFEST).start()
    p.kill(); p.wait()
    try: Run(tmp_path, {}, MANIFEST).start()
    finally: os.killpg(p.pid, signal.SIGKILL)


def test_one_of_two_that_start_together_wins(tmp_path):
    code = f'''
        import time
        from mlds.study.runs import Run
        try: Run({str(tmp_path)!r}, {{}}, {MANIFEST}).start(); print('won', flush=True); time.sleep(60)
        except RuntimeError as e: print('lost', 'in use by' in str(e), flush=True)'''
    both = [child(code) for _ in range(2)]
    try: assert sorted(p.stdout.readline() for p in both) == ['lost True\n', 'won\n']
    finally:
        for p in both: os.killpg(p.pid, signal.SIGKILL); p.wait()


def test_full_disk(tmp_path):
    "A file system of 64 kB, as only a namespace of its own may mount it."
    code = textwrap.dedent(f'''
        from mlds.study.runs import Run, load_runs
        first = Run('full', {{'seed': 0}}, {MANIFEST}).start(); first.finish({{'iou': .5}})
        run = Run('full', {{'seed': 1}}, {MANIFEST}).start()
        run.save_bytes('checkpoint.pt', b'1' * 8192)
        try: run.save_bytes('checkpoint.pt', b'2' * 200_000)
        except OSError as e: print(e)
        assert (run.work/'checkpoint.pt').read_bytes() == b'1' * 8192
        assert not list(run.work.glob('.*.tmp'))
        assert [r['id'] for r in load_runs('full')] == [first.id]
        (run.work/'checkpoint.pt').unlink()
        run.finish({{'iou': .6}})
        print(len(load_runs('full')), 'finished')''')
    (tmp_path/'full').mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs full && exec {sys.executable} -c "$CODE"'
    can = shutil.which('unshare') and subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', tmp_path/'full'],
                                                     capture_output=True).returncode == 0
    if not can: pytest.skip('mounting in a user namespace is not allowed here')
    done = subprocess.run(['unshare', '-rm', 'sh', '-c', script], cwd=tmp_path, env=os.environ | {'CODE': code},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'no space to write' in done.stdout and 'checkpoint.pt' in done.stdout and 'MiB free' in done.stdout
    assert '2 finished' in done.stdout


NOTEBOOK = [
    ("from mlds.study.runs import Param, collect_parameters\n"
     "SCHEMA = {'masks': Param('all', 'images with a mask', choices=('all',), type=int, low=1),\n"
     "          'lr': Param(1e-3, 'learning rate', low=0, high=1)}\n"
     "before = dict(globals())", []),
    ("masks = 'all'\nlr = 1e-3", ['parameters']),
    ("params = collect_parameters(globals(), SCHEMA, before=before)\nparams", []),
]

def through_papermill(folder, **params):
    cells = [nbformat.v4.new_code_cell(source, metadata={'tags': tags}) for source,tags in NOTEBOOK]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/'in.ipynb')
    nb = papermill.execute_notebook(folder/'in.ipynb', folder/'out.ipynb', params, progress_bar=False)
    return eval(nb.cells[-1].outputs[0]['data']['text/plain'])


def test_papermill_parameters(tmp_path):
    assert through_papermill(tmp_path, masks='12', lr=1) == {'masks': 12, 'lr': 1.}
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'mask'. Did you mean 'masks'"):
        through_papermill(tmp_path, mask=12)
    with pytest.raises(papermill.PapermillExecutionError, match="'masks' .images with a mask. is 0; allowed: 'all', or int at least 1"):
        through_papermill(tmp_path, masks=0)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
params = st.dictionaries(st.text(), scalars | st.lists(scalars), max_size=5)

@given(params)
def test_run_id_survives_json_and_order(p):
    import json
    again = json.loads(json.dumps(dict(reversed(p.items()))))
    assert run_id(again, MANIFEST) == run_id(p, MANIFEST)


@given(params, params)
def test_run_id_tells_parameters_apart(p, q):
    same = repr(sorted(p.items(), key=repr)) == repr(sorted(q.items(), key=repr))
    if same: assert run_id(p, MANIFEST) == run_id(q, MANIFEST)
    elif p != q: assert run_id(p, MANIFEST) != run_id(q, MANIFEST)


def test_atomic_file_under_concurrent_readers(tmp_path):
    "A reader sees one whole version or the other, never a mixture."
    file = tmp_path/'metrics.json'
    versions = {b'a' * 100_000, b'b' * 100_000}
    with atomic_file(file) as f: f.write(b'a' * 100_000)
    p = child(f'''
        from mlds.study.runs import atomic_file
        print('go', flush=True)
        while True:
            for c in (b'a', b'b'):
                with atomic_file({str(file)!r}) as f: f.write(c * 100_000)''')
    assert p.stdout.readline() == 'go\n'
    try: seen = {file.read_bytes() for _ in range(2000)}
    finally: os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert seen <= versions
