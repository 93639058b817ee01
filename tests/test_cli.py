"""The command `mlds`, as a user types it: every command, what goes wrong, a kill, and the built wheel in an empty folder.

Most commands are done in this process: to import torch takes longer than what they do. Kills, Ctrl-C and the wheel have
programs of their own."""
import json, os, re, shutil, signal, subprocess, sys, time, tomllib
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from conftest import ROOT, call
from mlds.cli import COMMANDS, RECIPES, main, options
from mlds.phantoms.oct import save_phantoms
from test_sources import duke

START = [sys.executable, '-c', 'import sys; from mlds.cli import main; sys.exit(main())']
TINY = '--size 32x48 --iterations 4 --width 2 --depth 2 --head-width 4 --bs 1'.split()
FEW = '--iterations 2 --bs 2'.split()


def environment(path=ROOT):
    "That of an editor's terminal, without a screen."
    return os.environ | {'PYTHONPATH': str(path), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'VSCODE_PID': '1'}

def program(folder, *words, path=ROOT, start=START, timeout=600):
    "Run the command as a program of its own; what it said."
    words = [*map(str, start), *map(str, words)]
    return subprocess.run(words, cwd=folder, env=environment(path), text=True, capture_output=True, timeout=timeout)

@contextmanager
def caught():
    "Files for all that this process and those it starts write to stdout and stderr."
    with TemporaryFile('w+') as out, TemporaryFile('w+') as err, redirect_stdout(out), redirect_stderr(err):
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try: yield out, err
        finally: os.dup2(kept[0], 1), os.dup2(kept[1], 2), os.close(kept[0]), os.close(kept[1])

def inside(folder, *words):
    "The same in this process, which spares it the imports."
    with chdir(folder), mock.patch.dict(os.environ, environment()), caught() as files:
        try: code = main(list(words))
        except SystemExit as e: code = e.code or 0
        for file in files: file.flush(), file.seek(0)
        return subprocess.CompletedProcess(words, code, *(file.read() for file in files))

def mlds(folder, *words, code=0, **elsewhere):
    "What a command says, with its output piped."
    done = program(folder, *words, **elsewhere) if elsewhere else inside(folder, *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert '\r' not in done.stdout + done.stderr and 'Traceback' not in done.stderr
    return done

def refused(folder, *words, code=2):
    "What the command says on stderr, in one line."
    done = mlds(folder, *words, code=code)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('mlds: '), done.stderr
    return done.stderr

def record(run): return json.loads((Path(run)/'run.json').read_text())

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A folder with an example, and a run that was trained on it."
    folder = tmp_path_factory.mktemp('cli')
    mlds(folder, 'example', 'eyes', '--volumes', 6, '--size', 48)
    done = mlds(folder, 'train', 'eyes', '--out', 'run', *TINY)
    (folder/'said.txt').write_text(done.stderr)
    assert done.stdout.startswith('run: curves.csv, ') and 'epoch' not in done.stdout
    return folder


def test_the_list_of_commands(tmp_path):
    said = mlds(tmp_path, start=START).stdout # a program of its own: `mlds` alone answers
    assert [re.match(r'  (\w+) ', l)[1] for l in said.splitlines() if l.startswith('  ')] == list(COMMANDS)
    assert re.fullmatch(r'mlds [\d.]+\n', mlds(tmp_path, '--version').stdout)

@pytest.mark.parametrize('command', COMMANDS)
def test_help(tmp_path, command):
    "Every option with its meaning; a notebook's parameters with the recommended values."
    said = ' '.join(mlds(tmp_path, command, '--help').stdout.split())
    assert said.startswith(f'usage: mlds {command} ') and COMMANDS[command].__doc__ in said and '(str)' not in said
    assert ('[--PARAMETER VALUE]' in said) == (command in RECIPES)
    for name, (default, meaning) in (options(command) if command in RECIPES else {}).items():
        if name in signature(COMMANDS[command]).parameters: continue
        if f"--{name.replace('_', '-')} {name.upper()} " not in said: continue
        value = RECIPES[command].get(name, default)
        assert 'iterations' != name or f'(default: {value})' in said
        assert meaning.split(';')[0].split()[0] in said

def test_help_of_train_lists_the_parameters(tmp_path):
    said = mlds(tmp_path, 'train', '--help').stdout
    hidden = {'data', 'runs', 'volumes', 'scans'}
    assert {n for n in options('train') if f"  --{n.replace('_', '-')} " not in said} == hidden

def test_check(work):
    said = mlds(work, 'check', 'eyes', '--sheet', 'sheet.png').stdout
    assert '36 images, 0 problems' in said and np.asarray(Image.open(work/'sheet.png').convert('L')).std() > 5
    shutil.copytree(work/'eyes', work/'broken')
    for image in sorted((work/'broken/images').iterdir())[:2]: image.unlink()
    with open(work/'broken/labels.csv', 'a') as f: f.write('\nnobody,v000\n')
    said = mlds(work, 'check', 'broken', '--sheet', 'none.png', code=1).stdout
    assert said.count('PROBLEM') >= 3 and 'nobody' in said and not (work/'none.png').exists()

def test_train(work):
    run, said = work/'run', (work/'said.txt').read_text()
    assert re.search(r'^36 images, trained at 32x48 pixels, 4 iterations: about \d+ seconds on', said, flags=re.M)
    assert re.search(r'^epoch 4/4 .* 0:00 left$', said, flags=re.M)
    there = {f.name for f in run.iterdir()}
    assert {'model.safetensors', 'per_image.csv', 'curves.csv', 'train.ipynb', 'report.html', 'run.json'} <= there
    assert not [n for n in there if n.startswith('.') or n.endswith('.tmp')]
    counts = pd.read_csv(run/'per_image.csv')
    assert set(counts['class']) >= {'background', 'IRF'} and (counts[['TP', 'FP', 'FN']].sum() > 0).all()
    page = (run/'report.html').read_text()
    assert page.count('data:image/png;base64') >= 8 and 'IoU low' in page and 'from mlds' not in page

def test_a_finished_run_stays(work):
    before = (work/'run/run.json').stat().st_mtime_ns
    assert 'is finished' in mlds(work, 'train', 'eyes', '--out', 'run', *TINY).stdout
    assert 'width: 2 there, 3 here' in refused(work, 'train', 'eyes', '--out', 'run', *TINY, '--width', 3)
    assert (work/'run/run.json').stat().st_mtime_ns == before

def test_predict(work):
    mlds(work, 'predict', 'run', 'eyes/images', '--out', 'masks', '--overlay')
    table = pd.read_csv(work/'masks/predictions.csv')
    assert len(table) == 36 and len(list((work/'masks/overlays').glob('*.png'))) == 36
    one = mlds(work, 'predict', 'run', 'run/model.safetensors', sorted((work/'eyes/images').iterdir())[0], '--out', 'one')
    assert 'predictions.csv' in one.stdout and len(pd.read_csv(work/'one/predictions.csv')) == 1

def test_evaluate(work):
    done = mlds(work, 'evaluate', 'run/model.safetensors', 'eyes', '--out', 'scores')
    assert 'mean foreground' in done.stdout and 'was trained on images of eyes' in done.stderr
    scores = pd.read_csv(work/'scores/scores.csv')
    assert {'IoU', 'IoU low', 'IoU high', 'Dice', 'HD95 pixels'} <= set(scores)
    assert set(pd.read_csv(work/'scores/by_image.csv').id) <= set(pd.read_csv(work/'eyes/labels.csv').id)

def test_export(work):
    said = mlds(work, 'export', 'run', '--onnx').stdout
    assert float(re.search(r'differs by at most (\S+) from PyTorch', said)[1]) < 1e-3
    assert (work/'run/model.onnx').stat().st_size > 1000
    assert '--onnx' in refused(work, 'export', 'run')

def test_start_and_like(work):
    "The network is that of the model a training starts from; a profile is laid over the recipe."
    (work/'settings.ini').write_text('[short]\niterations = 2\nbs = 2\nsize = 32x32\nbudgets = 3\n')
    mlds(work, 'train', 'eyes', '--out', 'second', '--start', 'run', '--like', 'short')
    params = record(work/'second')['params']
    assert [params[k] for k in ('width', 'depth', 'head_width', 'iterations', 'size')] == [2, 2, 4, 2, '32x32']
    assert params['start'] == str(work/'run/model.safetensors')
    assert "profile 'shor' is unknown; settings.ini has short" in refused(work, 'train', 'eyes', '--like', 'shor')

def test_parts_of_images_read_by_other_processes(work):
    "A crop is part of what a run is; how many processes read the images is not."
    words = ['train', 'eyes', '--out', 'parts', *TINY, '--crop', '32x32']
    said = mlds(work, *words, '--num-workers', 2).stderr
    assert 'trained at 32x32 pixels' in said
    params = record(work/'parts')['params']
    assert params['crop'] == '32x32' and 'num_workers' not in params and 'crop' not in record(work/'run')['params']
    assert 'is finished' in mlds(work, *words).stdout
    assert "crop: '32x32' there, 'none' here" in refused(work, 'train', 'eyes', '--out', 'parts', *TINY)

def one_fluid(folder, name, c):
    "Eyes in which one fluid was drawn."
    save_phantoms(folder, 3, 2, (32, 48), seed=c)
    for file in (folder/'masks').iterdir(): Image.fromarray(np.uint8(np.array(Image.open(file)) == c)).save(file)
    (folder/'classes.txt').write_text(f'background\n{name}\n')

def test_several_folders_and_a_public_set(tmp_path):
    "Two folders in which a fluid each was drawn, and Duke's .mat files: one network, and nothing is written into any."
    duke(tmp_path/'duke', np.random.default_rng(0), subjects=5, scans=4)
    folders = 'own', 'other', 'duke'
    for folder, fluid, c in (('own', 'PED', 3), ('other', 'SRF', 2)): one_fluid(tmp_path/folder, fluid, c)
    before = {f for folder in folders for f in (tmp_path/folder).rglob('*')}
    said = mlds(tmp_path, 'check', *folders).stdout
    assert 'own and other and duke: 22 images, 0 problems' in said and 'partial mask' in said
    assert '22 images, trained' in mlds(tmp_path, 'train', *folders, *TINY).stderr
    assert record(tmp_path/'run')['params']['data'] == ';'.join(folders) and set(record(tmp_path/'run')['manifest']) == {*folders}
    assert len(pd.read_csv(tmp_path/'run/per_image.csv')['class'].unique()) == 4
    done = mlds(tmp_path, 'evaluate', 'run', 'duke') # which shows one of the model's three classes
    assert 'fluid' in done.stdout and 'was trained on images of duke' in done.stderr
    mlds(tmp_path, 'predict', 'run', 'duke')
    assert {'PED', 'SRF', 'fluid'} < set(pd.read_csv(tmp_path/'predictions/predictions.csv'))
    assert {f for folder in folders for f in (tmp_path/folder).rglob('*')} == before
    assert 'two data folders are called own' in refused(tmp_path, 'train', 'own', 'own')
    assert 'lies in the data' in refused(tmp_path, 'train', 'own', 'duke', '--out', 'duke/run')

@pytest.mark.parametrize('words, says', [
    (['trian', 'eyes'], 'did you mean train?'),
    (['train'], 'required: FOLDER'),
    (['train', 'eyes', '--iteration', '4'], 'mlds train does not know --iteration: did you mean --iterations?'),
    (['train', 'eyes', '--headwidth', '4'], 'did you mean --head-width?'),
    (['train', 'eyes', '--lr', '-1'], "'lr' (largest learning rate of the one-cycle schedule) is '-1'; allowed: (0, 1]"),
    (['train', 'masks2', '--lr', '-1'], "'lr' (largest"), # before anything is read
    (['train', 'eyes', '--kind', 'box'], 'one of none, unlabelled, image labels, boxes'),
    (['train', 'nowhere'], 'nowhere is not a folder'),
    (['train', 'eyes', '--out', 'eyes/run'], 'lies in the data'),
    (['train', 'eyes', '--out', 'masks2'], 'holds other files'),
    (['check', 'nowhere'], 'nowhere is not a folder'),
    (['check', 'eyes', '--unit', 'pixels'], "invalid choice: 'pixels'"),
    (['check', 'eyes', '--channels', '4'], 'channels=4: a number from 1 to 3'),
    (['check', 'eyes', '--sheet', 'masks2/a.txt/sheet.png'], 'a.txt is a file: choose another folder with --sheet'),
    (['predict', 'nowhere', 'eyes/images'], 'there is no model at nowhere'),
    (['predict', 'run', 'nothing'], 'nothing'),
    (['predict', 'run', 'eyes/images', '--out', 'masks2/a.txt'], 'a.txt is a file'),
    (['export', 'run', '--onnx', '--out', 'masks2/a.txt/m.onnx'], 'a.txt is a file'),
    (['evaluate', 'run', 'nowhere'], 'nowhere'),
    (['pretrain', 'eyes', 'run'], 'run is not a finished run of mlds explain'),
])
def test_what_is_typed_wrongly(work, words, says):
    (work/'masks2').mkdir(exist_ok=True)
    (work/'masks2/a.txt').write_text('mine')
    assert says in refused(work, *words)

def test_debug_shows_where(work):
    done = inside(work, 'train', 'nowhere', '--debug')
    assert done.returncode == 2 and 'Traceback' in done.stderr and done.stderr.rstrip().endswith('data set')

def test_an_error_of_the_notebook_is_one_line(work):
    "What only the notebook finds, before its training."
    shutil.copytree(work/'eyes', work/'cut')
    image = sorted((work/'cut/images').iterdir())[-1] # the first ones tell the size
    image.write_bytes(image.read_bytes()[:60])
    done = mlds(work, 'train', 'cut', '--out', 'never', *TINY, code=1)
    assert image.stem in done.stderr and len(done.stderr.splitlines()) < 10
    again = refused(work, 'predict', 'never', 'cut/images') # says what the training ended with
    assert again.startswith('mlds: never is not finished (it ended with: ') and image.stem in again
    assert again.endswith('give the command that began it once more\n')

def test_a_missing_extra_is_named(work):
    start = [sys.executable, '-c', "import sys; sys.modules['papermill'] = None; from mlds.cli import main; sys.exit(main())"]
    done = mlds(work, 'train', 'eyes', '--out', 'extra', *TINY, code=2, start=start)
    assert done.stderr == "mlds: this command runs a notebook, for which papermill is missing: pip install 'mlds[run]'\n"
    with mock.patch.dict(sys.modules, onnx=None): said = refused(work, 'export', 'run', '--onnx')
    assert said == "mlds: onnx is missing; run: pip install 'mlds[onnx]'\n"

def test_every_extra_that_an_error_names_is_there():
    named = {e for f in (ROOT/'mlds').rglob('*.py') for e in re.findall(r"pip install '?mlds\[(\w+)\]", f.read_text())}
    assert named == {'run', 'formats', 'onnx'}
    assert named < set(tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies'])


LONGER = [*TINY, '--iterations', '60', '--epochs', '30']

def saved(work, out):
    "When the checkpoint of an unfinished training was written; 0 if there is none."
    return max((f.stat().st_mtime_ns for f in (work/out).glob('.work/*.partial/checkpoint.pt')), default=0)

def begun(work, out, after=0):
    "A training in a process of its own, once it has saved something."
    words = [*START, 'train', 'eyes', '--out', out, *LONGER]
    process = subprocess.Popen(list(map(str, words)), cwd=work, env=environment(), text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.time() + 120
    while saved(work, out) <= after:
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(.02)
    return process, psutil.Process(process.pid).children(recursive=True)

def test_a_stopped_and_killed_training_goes_on(work):
    "Ctrl-C first; the same command goes on and is killed; the same command goes on."
    process, kernels = begun(work, 'interrupted')
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.endswith('\nstopped; the same command goes on\n')
    assert not psutil.wait_procs(kernels, timeout=20)[1]
    process, kernels = begun(work, 'interrupted', after=saved(work, 'interrupted'))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(kernels, timeout=20) # they notice that their parent is gone
    assert not (work/'interrupted/run.json').exists()
    mlds(work, 'train', 'eyes', '--out', 'interrupted', *LONGER)
    assert len(record(work/'interrupted')['environment']['earlier']) == 2 and not (work/'interrupted/.work').exists()

def test_paper_2(tmp_path):
    "From image labels to weights that a training starts from; a step reads from the one before what it must know."
    mlds(tmp_path, 'example', 'chests', '--of', 'findings', '--volumes', 4, '--size', 64)
    for k in (0, 1):
        mlds(tmp_path, 'classify', 'chests', '--out', f'c{k}', '--arch', 'test_resnet', '--seed', k, *FEW)
    mlds(tmp_path, 'explain', 'chests', 'c0', 'c1', '--out', 'e', '--steps', 2)
    said = mlds(tmp_path, 'pretrain', 'chests', 'e', '--out', 'p', '--width', 2, '--head-width', 4, *FEW).stderr
    page = (tmp_path/'p/report.html').read_text()
    assert ('warning: IoU with its own' in said) == ('train longer' in page) and 'UserWarning' not in said + page
    assert record(tmp_path/'e')['params']['members'] == f'{tmp_path}/c0,{tmp_path}/c1'
    assert record(tmp_path/'p')['params']['source'] == f'{tmp_path}/c0' and (tmp_path/'p/report.html').exists()
    assert 'mean' in mlds(tmp_path, 'evaluate', 'c0', 'chests').stdout
    mlds(tmp_path, 'example', 'masked', '--of', 'anatomy', '--volumes', 2, '--size', 64)
    mlds(tmp_path, 'train', 'masked', '--start', 'p', '--out', 'tuned', *FEW)
    assert record(tmp_path/'tuned')['params']['encoder'] == 'test_resnet'


@pytest.fixture(scope='module')
def installed(checkout, tmp_path_factory):
    "The built wheel, installed into a folder of its own."
    folder = tmp_path_factory.mktemp('wheel')
    for words in (['wheel', '.', '-w', folder], ['install', '--target', folder/'site', '--no-index', '--find-links', folder, 'mlds']):
        done = call(sys.executable, '-m', 'pip', *words, '--no-deps', '--quiet', cwd=checkout)
        assert done.returncode == 0, done.stderr
    return folder/'site'

def test_the_wheel_trains_in_an_empty_folder(installed, tmp_path):
    "Its own program, notebooks and modules, nothing of the checkout."
    command = dict(path=installed, start=[sys.executable, installed/'bin/mlds'])
    where = 'import mlds, importlib.resources as r; print(mlds.__file__); print(r.files("mlds.experiments")/"train.ipynb")'
    said = mlds(tmp_path, path=installed, start=[sys.executable, '-c', where]).stdout.split()
    assert said == [str(installed/'mlds/__init__.py'), str(installed/'mlds/experiments/train.ipynb')]
    mlds(tmp_path, 'example', 'eyes', '--volumes', 4, '--size', 48, **command)
    mlds(tmp_path, 'check', 'eyes', **command)
    mlds(tmp_path, 'train', 'eyes', *TINY, **command)
    mlds(tmp_path, 'predict', 'run', 'eyes/images', **command)
    assert len(pd.read_csv(tmp_path/'predictions/predictions.csv')) == 24
    assert {p.name for p in tmp_path.iterdir()} == {'eyes', 'check.png', 'run', 'predictions'}

def test_the_checkout_uses_its_own_notebooks():
    from mlds.cli import notebook_file
    assert notebook_file('train') == ROOT/'nbs/experiments/train.ipynb'
