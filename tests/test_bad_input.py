"""Bad input as a user meets it: one error before any training, which names the file, row or parameter and the remedy.

A case breaks a small dataset folder or a parameter and lists the words that the error must hold; training itself is
replaced by an alarm, so an error that comes only afterwards fails the case too."""
import re, shutil, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image

from mlds import experiments
from mlds.dataloaders import mixed_dataloaders
from mlds.catalogue import check_catalogue, read_folder
from mlds.study.experiments import load_data, train_and_record
from mlds.phantoms.oct import save_phantoms
from mlds.study.plan import TRAIN, data_manifest, identity, main, make_plan
from mlds.study.runs import Run, check_parameters

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SMALL = dict(size='32x48', iterations=2, epochs=1, masks=1, bs=1, width=2, depth=2, head_width=4, valid=.2, test=.2)
A = 'v003_s00'  # an image of a training group, and of no other split
SPLIT = {'v000': 'valid', 'v001': 'test', 'v002': 'train', 'v003': 'train', 'v004': 'train'}


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
    "Five volumes of two scans with masks, every image with a split."
    folder = save_phantoms(tmp_path_factory.mktemp('data')/'eyes', 5, 2, (32, 48), seed=1)
    edit(folder, lambda t: t.assign(split=t.group.map(SPLIT)))
    return folder

@pytest.fixture
def folder(pristine, tmp_path): return shutil.copytree(pristine, tmp_path/'eyes')

class Began(Exception): "Training was about to begin."

@pytest.fixture
def start(monkeypatch, tmp_path):
    "What the train notebook does, up to the first step of training."
    def alarm(*_): raise Began
    def go(folder, **params):
        params = check_parameters({**SMALL, 'data': str(folder), 'runs': str(tmp_path/'runs'), **params}, TRAIN)
        rows, classes = load_data(params)
        train_and_record(Run(params['runs'], identity(params), data_manifest(params)), params, rows, classes)
    monkeypatch.setattr(experiments, 'fit', alarm)
    return go


def edit(folder, change, name='labels.csv'): change(pd.read_csv(folder/name, dtype=str)).to_csv(folder/name, index=False)
def put(**values): return lambda t: t.assign(**{k: t[k].where(t.id != A, v) if k in t else np.where(t.id == A, v, None) for k, v in values.items()})
def cut(file): file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
def save(file, pixels, **kwargs): Image.fromarray(np.asarray(pixels)).save(file, **kwargs)
def nan_image(file):
    pixels = np.random.rand(32, 48).astype(np.float32)
    pixels[3, 4] = np.nan
    save(file, pixels, format='TIFF')
def whiten(folder, classes):
    for file in (folder/'masks').iterdir(): save(file, (np.array(Image.open(file)) > 0).astype(np.uint8)*255)
    if classes: (folder/'classes.txt').write_text('background\nfluid\n')
    else: (folder/'classes.txt').unlink()
def box(folder, *values, id=A):
    edit(folder, put(kind='boxes'))
    (folder/'boxes.csv').write_text('id,class,x0,y0,x1,y1\n' + ','.join(map(str, (id, *values))) + '\n')


def test_the_sound_folder_reaches_training(folder, start):
    with pytest.raises(Began): start(folder)
    box(folder, 'IRF', 1, 2, 3, 4)
    check_catalogue(*read_folder(folder))


FILES = {
    'missing image': (lambda f: (f/'images'/f'{A}.png').unlink(), [A, f'images/{A}.png', 'does not exist']),
    'missing mask': (lambda f: (edit(f, put(kind='mask')), (f/'masks'/f'{A}.png').unlink()), [A, f'masks/{A}.png', 'does not exist']),
    'truncated image': (lambda f: cut(f/'images'/f'{A}.png'), [A, f'images/{A}.png', 'cannot be read', 'replace']),
    'truncated mask': (lambda f: cut(f/'masks'/f'{A}.png'), [A, f'masks/{A}.png', 'cannot be read', 'replace']),
    'no image at all': (lambda f: (f/'images'/f'{A}.png').write_text('see mail'), [A, f'images/{A}.png', 'cannot be read']),
    'mask in colour': (lambda f: save(f/'masks'/f'{A}.png', np.zeros((32, 48, 3), np.uint8)), [A, f'masks/{A}.png', '3 channels', 'one 8-bit channel']),
    'mask of another size': (lambda f: save(f/'masks'/f'{A}.png', np.zeros((30, 48), np.uint8)), [A, '(30, 48)', '(32, 48)', 'agree']),
    'class id outside the list': (lambda f: save(f/'masks'/f'{A}.png', np.full((32, 48), 9, np.uint8)), [A, '9', '4 classes', '0..3']),
    'masks of 0 and 255': (lambda f: whiten(f, True), ['255', '2 classes', '0..1']),
    'masks of 0 and 255, no list': (lambda f: whiten(f, False), ['255', 'classes.txt']),
    'NaN image': (lambda f: nan_image(f/'images'/f'{A}.png'), [A, f'images/{A}.png', 'NaN', 'remove']),
    'constant image': (lambda f: save(f/'images'/f'{A}.png', np.full((32, 48), 7, np.uint8)), [A, f'images/{A}.png', 'constant', 'remove']),
    'no labels.csv': (lambda f: (f/'labels.csv').unlink(), ['labels.csv', 'does not exist', 'id, group']),
    'empty labels.csv': (lambda f: (f/'labels.csv').write_text(''), ['labels.csv']),
    'no column id': (lambda f: edit(f, lambda t: t.drop(columns='id')), ['labels.csv', 'lacks', 'id']),
    'id twice': (lambda f: edit(f, lambda t: pd.concat([t, t[t.id == A]])), ['labels.csv', A, 'twice']),
    'blank id': (lambda f: edit(f, lambda t: t.assign(id=t.id.where(t.id != A))), ['labels.csv', 'id']),
    'blank group': (lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A))), [A, 'group']),
    'blank group, no splits': (lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A)).drop(columns='split')), [A, 'group']),
    'unknown kind': (lambda f: edit(f, put(kind='bbox')), [A, 'bbox', 'the kinds are', 'boxes']),
    'unknown image label': (lambda f: edit(f, put(kind='tags', tags='IRF edema')), [A, 'edema', 'IRF, SRF, PED']),
    'masks gone': (lambda f: shutil.rmtree(f/'masks'), ['mask', 'v00']),
    'a test image without mask': (lambda f: (f/'masks'/'v001_s00.png').unlink(), ['v001_s00', 'mask', 'test']),
    'a validation image without mask': (lambda f: (f/'masks'/'v000_s00.png').unlink(), ['v000_s00', 'mask', 'validation']),
    'a training image without mask': (lambda f: (f/'masks'/f'{A}.png').unlink(), [A, 'mask']),
    'no foreground': (lambda f: [save(m, np.zeros((32, 48), np.uint8)) for m in (f/'masks').iterdir()], ['positive_only', 'foreground']),
    'a class twice': (lambda f: (f/'classes.txt').write_text('background\nIRF\nIRF\nPED\n'), ['classes.txt', 'IRF']),
    'a blank class': (lambda f: (f/'classes.txt').write_text('background\nIRF\n\nPED\n'), ['classes.txt']),
    'background alone': (lambda f: (f/'classes.txt').write_text('background\n'), ['class']),
    'box outside': (lambda f: box(f, 'IRF', 1, 2, 300, 4), [A, '300', 'leaves the image of 48x32']),
    'box inverted': (lambda f: box(f, 'IRF', 9, 2, 3, 4), [A, 'inverted', 'x0 < x1']),
    'box with NaN': (lambda f: box(f, 'IRF', 1, 2, '', 4), [A, 'not a number']),
    'box with text': (lambda f: box(f, 'IRF', 'a', 2, 3, 4), [A, "'a'", 'number']),
    'box of an unknown class': (lambda f: box(f, 'drusen', 1, 2, 3, 4), ['boxes.csv row 2', 'drusen', 'IRF, SRF, PED']),
    'box of the background': (lambda f: box(f, 'background', 1, 2, 3, 4), [A, 'foreground classes are 1..3']),
    'box of no image': (lambda f: box(f, 'IRF', 1, 2, 3, 4, id='v9_s9'), ['boxes.csv', 'v9_s9']),
    'no validation': (lambda f: edit(f, lambda t: t.assign(split=t.split.replace('valid', 'train'))), ["'valid' is empty", 'group']),
    'no training': (lambda f: edit(f, lambda t: t.assign(split=t.split.replace('train', 'test'))), ["'train' is empty", 'group']),
    'no test': (lambda f: edit(f, lambda t: t.assign(split=t.split.replace('test', 'train'))), ["'test' is empty", 'group']),
    'unknown split': (lambda f: edit(f, lambda t: t.assign(split=t.split.replace('valid', 'val'))), ['val', 'train, valid, test']),
    'group on both sides': (lambda f: edit(f, put(split='valid')), ['group v003', 'both sides', 'one side']),
    'one patient': (lambda f: edit(f, lambda t: t.assign(group='p').drop(columns='split')), ['1 group', 'cannot be split into train, 1 valid and 1 test']),
}

@pytest.mark.parametrize('case', FILES)
def test_folder(folder, start, case):
    spoil, words = FILES[case]
    spoil(folder)
    with pytest.raises((ValueError, OSError)) as e: start(folder)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'


PARAMETERS = {
    'unknown': (dict(mask=3), ["unknown parameter 'mask'", "'masks'"]),
    'unknown value': (dict(kind='box'), ["'kind'", "'box'", "'boxes'"]),
    'not a number': (dict(lr='fast'), ["'lr'", "'fast'", 'float']),
    'NaN': (dict(lr=float('nan')), ["'lr'", 'nan']),
    'below the limit': (dict(iterations=0), ["'iterations'", 'at least 1']),
    'above the limit': (dict(decay=1.), ["'decay'", 'at most']),
    'half an image': (dict(masks=1.5), ["'masks'", '1.5', 'int']),
    'odd size': (dict(size='12by3'), ["'size'", '12by3', 'HEIGHTxWIDTH']),
    'tiny size': (dict(size='16x16'), ["'size'", '16x16', '32']),
    'no full epochs': (dict(iterations=5, epochs=2), ['iterations', '5', 'epochs', '2']),
    'budget larger than the pool': (dict(masks=99), ['99', 'training has', "'all'"]),
    'pool larger than the data': (dict(pool=99), ["'pool'", '99']),
    'classes that the masks do not have': (dict(classes='background,IRF'), ['2 classes', '0..1']),
    'no share for the test': (dict(test=0, from_shares=True), ["'test'"]),
    'no share for validation': (dict(valid=0, from_shares=True), ["'valid'"]),
    'shares that leave no training': (dict(valid=.6, test=.6, from_shares=True), ['5 groups', 'smaller shares']),
    'no such folder': (dict(data='/no/such/folder'), ['/no/such/folder', 'does not exist']),
}

@pytest.mark.parametrize('case', PARAMETERS)
def test_parameter(folder, start, case):
    given, words = PARAMETERS[case]
    given = dict(given)
    if given.pop('from_shares', False): edit(folder, lambda t: t.drop(columns='split'))
    with pytest.raises((ValueError, OSError)) as e: start(folder, **given)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'


# weak annotations, by way of the library

def weak_rows(folder, change):
    edit(folder, lambda t: change(t.assign(kind='mask')))
    return read_folder(folder)

@pytest.mark.parametrize('kind,words', [('boxes', ['boxes.csv']), ('tags', ['tags'])])
def test_a_kind_without_its_data(folder, kind, words):
    "A whole column of kind 'boxes' but no boxes.csv: to take every image for healthy would teach background everywhere."
    change = lambda t: t.assign(kind=np.where(t.id.str.startswith('v003'), kind, t.kind))
    with pytest.raises((ValueError, OSError)) as e: mixed_dataloaders(*weak_rows(folder, change))
    for word in words: assert word in str(e.value)

def test_no_training_mask(folder):
    change = lambda t: t.assign(kind=np.where(t.split == 'train', 'unlabelled', t.kind))
    with pytest.raises(ValueError, match='no training image has a mask'): mixed_dataloaders(*weak_rows(folder, change))

@pytest.mark.parametrize('quota,word', [(dict(mask=2), 'no quota for'), (dict(mask=2, unlabelled=2, boxes=1), 'boxes'), (dict(mask=0, unlabelled=2), 'at least 1')])
def test_quota(folder, quota, word):
    change = lambda t: t.assign(kind=np.where(t.group == 'v003', 'unlabelled', t.kind))
    with pytest.raises(ValueError, match=word): mixed_dataloaders(*weak_rows(folder, change), quota=quota)

def test_images_of_several_sizes_without_a_size(folder):
    for kind in ('images', 'masks'):
        file = folder/kind/f'{A}.png'
        Image.open(file).resize((40, 40), Image.NEAREST).save(file)
    with pytest.raises(ValueError, match='size'): mixed_dataloaders(*read_folder(folder), bs=8, iterations=3).train.one_batch()

def test_test_images_of_several_sizes(folder, tmp_path):
    "Real scanners differ in size; a training must not end in an error after the last step."
    for kind in ('images', 'masks'):
        file = folder/kind/'v001_s00.png'
        Image.open(file).resize((40, 40), Image.NEAREST).save(file)
    params = check_parameters({**SMALL, 'data': str(folder), 'runs': str(tmp_path/'runs')}, TRAIN)
    run = Run(params['runs'], identity(params), data_manifest(params))
    try: train_and_record(run, params, *load_data(params))
    except (ValueError, OSError) as e: assert 'size' in str(e) and not (run.work/'checkpoint.pt').exists()
    else: assert run.finished and len(pd.read_csv(run.path/'per_image.csv')) == 2


# settings.ini and the command line

INI = {
    'unknown profile': ('[tiny]\nbudgets = 3\nseeds = 0\n', ['quick', 'tiny', 'settings.ini']),
    'unknown parameter': ('[quick]\nbudgets = 3\nseeds = 0\niteration = 5\n', ["'iteration'", "'iterations'"]),
    'unknown value': ('[quick]\nbudgets = 3\nseeds = 0\nprecision = fp8\n', ["'precision'", 'fp8', 'bf16']),
    'not a number': ('[quick]\nbudgets = 3\nseeds = 0\niterations = many\n', ["'iterations'", 'many']),
    'no budgets': ('[quick]\nseeds = 0\n', ['budgets', 'quick']),
    'empty budgets': ('[quick]\nbudgets =\nseeds = 0\n', ['budgets']),
    'budgets with text': ('[quick]\nbudgets = 3, 6\nseeds = 0\n', ['budgets', '3,']),
    'a budget of nothing': ('[quick]\nbudgets = 0\nseeds = 0\n', ["'masks'", 'at least 1']),
    'seeds with text': ('[quick]\nbudgets = 3\nseeds = one\n', ['seeds', 'one']),
    'odd size': ('[quick]\nbudgets = 3\nseeds = 0\nsize = 64\n', ["'size'", 'HEIGHTxWIDTH']),
    'no section': ('budgets = 3\n', ['settings.ini']),
    'a parameter twice': ('[quick]\nbudgets = 3\nbudgets = 6\n', ['settings.ini', 'budgets']),
    'a percent sign': ('[quick]\nbudgets = 3\nseeds = 0\nvalid = 10%\n', ['valid']),
    'no file': (None, ['settings.ini', 'does not exist']),
}

@pytest.mark.parametrize('case', INI)
def test_settings(tmp_path, monkeypatch, case):
    "The command line says `error: ...` and no traceback, whatever settings.ini holds."
    text, words = INI[case]
    if text is not None: (tmp_path/'settings.ini').write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(['begin', 'quick'])
    assert str(e.value).startswith('error: ')
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'
    assert len(str(e.value).splitlines()) == 1, 'the command line promises one line'

@pytest.mark.parametrize('args,words', [([], ['begin', 'end', 'collect']), (['start'], ['start', 'begin']), (['begin', 'smoke', 'phantoms', 'r', 'f', 'x'], ['error']),
                                        (['begin', 'smoke', 'no/data'], ['no/data', 'labels.csv', 'does not exist'])])
def test_command_line(monkeypatch, args, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['mlds-plan'])
    with pytest.raises(SystemExit) as e: main(args)
    for word in ['error: ', *words]: assert word in str(e.value)

def test_the_program_itself(tmp_path):
    "`mlds-plan begin` as `make reproduce` calls it: one line, exit status 1."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    done = subprocess.run([sys.executable, '-c', 'from mlds.study.plan import main; main()', 'begin', 'fast'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"error: profile 'fast' is unknown; settings.ini has smoke, quick, full, shares\n", done.stderr)


# the train notebook, through papermill

def through_papermill(tmp_path, **params):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        papermill.execute_notebook(ROOT/'nbs/experiments/train.ipynb', tmp_path/'out.ipynb', {**SMALL, 'runs': str(tmp_path/'runs'), **params},
                                   progress_bar=False, kernel_name='python3', cwd=ROOT)

def test_notebook_with_an_unknown_value(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="parameter 'teacher' .* is 'mean'; allowed: 'none', 'self', 'ema'"):
        through_papermill(tmp_path, teacher='mean')
    assert not (tmp_path/'runs').exists()

def test_notebook_with_a_truncated_image(folder, tmp_path):
    cut(folder/'images'/f'{A}.png')
    with pytest.raises(papermill.PapermillExecutionError, match=f'id {A}: image .*{A}.png cannot be read .*: replace or remove the file'):
        through_papermill(tmp_path, data=str(folder))
    assert not list((tmp_path/'runs').glob('*'))

def test_notebook_with_one_test_group(folder, tmp_path):
    "One patient in the test is little, but no error: there is just no interval over groups."
    through_papermill(tmp_path, data=str(folder))
    assert len(list((tmp_path/'runs').glob('*/metrics.json'))) == 1
