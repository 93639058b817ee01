"""Bad folders as a user meets them: one error before any training, which names file and row, and the remedy.

A case breaks a small dataset folder and lists the words that the error must hold; what looks broken and is not has a
table of its own, with what must be read."""
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from mlds.annotations import Boxes, ImageLabels, Points, Unlabelled
from mlds.catalogue import Catalogue, check_catalogue, simulate_budget, split_groups, task_of
from mlds.folders import check_folder, join_catalogues, read_folder, save_example
from mlds.dataloaders import make_dataloaders
from mlds.learner import fit, make_learner, mixed_precision
from mlds.models import load_model
from mlds.phantoms.oct import save_phantoms
from mlds.task import Task

torch.set_num_threads(1)
A = 'v003_s00'  # an image of a training group, and of no other split
IMAGE, MASK = f'images/{A}.png', f'masks/{A}.png'
BOX, POINT = 'id,class,x0,y0,x1,y1', 'id,class,x,y'
SPLIT = {'v000': 'valid', 'v001': 'test', 'v002': 'train', 'v003': 'train', 'v004': 'train'}


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
    "Five volumes of two scans with masks, every image with a split."
    folder = save_phantoms(tmp_path_factory.mktemp('data')/'eyes', 5, 2, (32, 48), seed=1)
    edit(folder, lambda t: t.assign(split=t.group.map(SPLIT)))
    return folder

@pytest.fixture
def folder(pristine, tmp_path): return shutil.copytree(pristine, tmp_path/'eyes')

def start(folder, **kwargs):
    "What a training does before its first step."
    cat = read_folder(folder)
    cat = cat if 'split' in cat else split_groups(cat)
    return make_dataloaders(simulate_budget(cat, positive_only=True), bs=8, **kwargs)


def edit(folder, change, name='labels.csv'):
    change(pd.read_csv(folder/name, dtype=str)).to_csv(folder/name, index=False)
def put(**values):
    def column(t, k, v): return t[k].where(t.id != A, v) if k in t else np.where(t.id == A, v, None)
    def change(t): return t.assign(**{k: column(t, k, v) for k, v in values.items()})
    return change
def move(old, new): return lambda t: t.assign(split=t.split.replace(old, new))
def edit_bytes(folder, old, new):
    file = folder/'labels.csv'
    file.write_bytes(file.read_bytes().replace(old, new))
def pages(file):
    page = Image.open(file)
    page.save(file, format='TIFF', save_all=True, append_images=[page])
def cut(file): file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
def save(file, pixels, **kwargs): Image.fromarray(np.asarray(pixels)).save(file, **kwargs)
def nan_image(file):
    pixels = np.random.rand(32, 48).astype(np.float32)
    pixels[3, 4] = np.nan
    save(file, pixels, format='TIFF')
def whiten(folder, classes):
    for file in (folder/'masks').iterdir(): save(file, (np.array(Image.open(file)) > 0).astype(np.uint8)*255)
    if classes: (folder/'classes.txt').write_text('\n'.join(classes) + '\n')
    else: (folder/'classes.txt').unlink()
def name(folder, new, old=A):
    "Call an image by another id in labels.csv, where its file does not move."
    edit(folder, lambda t: t.assign(id=t.id.replace(old, new)))
def table(folder, file, columns, *rows, kind=''):
    "A table of marks; the mask of the image is removed."
    (folder/MASK).unlink(missing_ok=True)
    edit(folder, put(kind=kind))
    (folder/file).write_text('\n'.join([columns, *(','.join(map(str, r)) for r in rows)]) + '\n')
def box(folder, *values, id=A): table(folder, 'boxes.csv', BOX, (id, *values), kind='boxes')
def point(folder, *values): table(folder, 'points.csv', POINT, (A, *values))
def points(folder, *rows): table(folder, 'points.csv', f'{POINT},present', *((A, *r) for r in rows))
def strokes(folder, *rows): table(folder, 'scribbles.csv', 'id,stroke,class,x,y', *((A, *r) for r in rows))
def annotation(folder, where, pixels, **kwargs):
    "An annotation as an image instead of the mask."
    (folder/MASK).unlink(missing_ok=True)
    file = folder/where/f'{A}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    save(file, pixels, **kwargs)
def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png(width, height, data):
    "A PNG file whose header may promise anything."
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
def link_outside(folder, sub):
    "A link from the folder to a file or folder beside it."
    outside = folder.parent/'outside'
    shutil.move(folder/sub, outside)
    (folder/sub).symlink_to(outside)


def test_the_sound_folder_reaches_training(folder):
    assert start(folder).one_batch()[0].shape == (8, 1, 32, 48)
    box(folder, 'IRF', 1, 2, 3, 4)
    assert read_folder(folder).annotation[6] == Boxes([(1, 1, 2, 3, 4)])


FILES = {
    'missing image': (lambda f: (f/IMAGE).unlink(), [f'labels.csv row 8 ({A})', f'images/{A}', 'does not exist']),
    'missing mask': (lambda f: (edit(f, put(kind='mask')), (f/MASK).unlink()), [A, f'masks/{A}', 'does not exist']),
    'mask of another name': (lambda f: (f/MASK).rename(f/'masks/v3_s0.png'), ['v3_s0.png', 'no image', 'rename']),
    'truncated image': (lambda f: cut(f/IMAGE), [A, IMAGE, 'cannot be read', 'replace']),
    'truncated mask': (lambda f: cut(f/MASK), [A, MASK, 'cannot be read', 'replace']),
    'no image at all': (lambda f: (f/IMAGE).write_text('see mail'), [A, IMAGE, 'cannot be read']),
    'a pickle as image': (lambda f: (f/IMAGE).write_bytes(pickle.dumps(Evil(f))), [A, IMAGE, 'cannot be read']),
    'a pickle as table': (lambda f: (f/'labels.csv').write_bytes(pickle.dumps(Evil(f))),
                          ['labels.csv', 'not a text file']),
    'arrays as images': (lambda f: np.save((f/IMAGE).with_suffix('.npy'), (f/IMAGE).unlink() or np.eye(32)),
                         [A, f'{A}.npy is none of them']),
    'absurd dimensions': (lambda f: (f/IMAGE).write_bytes(png(60000, 60000, b'')), [A, IMAGE, '3600000000 pixels']),
    'a header without data': (lambda f: (f/IMAGE).write_bytes(png(9000, 9000, b'')), [A, IMAGE, 'cannot be read']),
    'a bomb': (lambda f: (f/IMAGE).write_bytes(png(48, 32, bytes(10**8))), [A, IMAGE]),
    'an image twice': (lambda f: shutil.copy(f/IMAGE, f/f'images/{A}.tif'), [A, f'{A}.tif', 'keep one']),
    'a mask twice': (lambda f: shutil.copy(f/MASK, f/f'masks/{A}.bmp'), [A, f'{A}.bmp', 'keep one']),
    'id out of the folder': (lambda f: name(f, '../../outside'), ['row 8', 'leads out of', 'plain name']),
    'absolute id': (lambda f: name(f, '/etc/passwd'), ['row 8', 'leads out of', 'plain name']),
    'id with a null': (lambda f: edit_bytes(f, A.encode(), A.encode() + b'\0'), ['labels.csv', 'not a text file']),
    'id of blanks': (lambda f: name(f, '   '), ['labels.csv row 8', 'id is blank']),
    'link to an image outside': (lambda f: link_outside(f, IMAGE), [A, 'leads out of', 'copy the file']),
    'link to a mask outside': (lambda f: link_outside(f, MASK), [A, 'leads out of', 'copy the file']),
    'mask in colour': (lambda f: save(f/MASK, np.zeros((32, 48, 3), np.uint8)),
                       [A, MASK, '3 channels', 'one 8-bit channel']),
    'mask of another size': (lambda f: save(f/MASK, np.zeros((30, 48), np.uint8)),
                             [A, MASK, '(30, 48)', '(32, 48)', 'agree']),
    'class id outside the list': (lambda f: save(f/MASK, np.full((32, 48), 9, np.uint8)),
                                  [A, MASK, '9', '4 classes', '0..3']),
    'masks of 0 and 255, four classes': (lambda f: whiten(f, ['background', 'IRF', 'SRF', 'PED']),
                                         ['masks', '0 and 255', '4 classes', 'classes.txt']),
    'mask with soft edges': (lambda f: save(f/MASK, np.uint8([[0, 90, 255]]*3)), [A, MASK, 'soft edges', '> 127']),
    'NaN image': (lambda f: nan_image(f/IMAGE), [A, IMAGE, 'NaN', 'remove']),
    'constant image': (lambda f: save(f/IMAGE, np.full((32, 48), 7, np.uint8)), [A, IMAGE, 'constant', 'remove']),
    'no labels.csv': (lambda f: (f/'labels.csv').unlink(), ['labels.csv', 'does not exist', 'id, group']),
    'labels.csv is a folder': (lambda f: ((f/'labels.csv').unlink(), (f/'labels.csv').mkdir()), ['labels.csv']),
    'empty labels.csv': (lambda f: (f/'labels.csv').write_text(''), ['labels.csv', 'empty']),
    'labels.csv without rows': (lambda f: (f/'labels.csv').write_text('id,group\n'),
                                ['labels.csv', 'no images', 'row']),
    'no column id': (lambda f: edit(f, lambda t: t.drop(columns='id')), ['labels.csv', 'lacks', 'id']),
    'column id twice': (lambda f: edit_bytes(f, b'id,group', b'id,id'), ['labels.csv', 'id occurs twice']),
    'more cells than columns': (lambda f: edit_bytes(f, A.encode(), f'{A},p,train,x,x,x,x,x,x'.encode()),
                                ['labels.csv', 'row 8', 'cells', 'quotes']),
    'id twice': (lambda f: edit(f, lambda t: pd.concat([t, t[t.id == A]])), ['labels.csv', A, 'twice']),
    'blank id': (lambda f: edit(f, lambda t: t.assign(id=t.id.where(t.id != A))), ['labels.csv', 'id']),
    'blank group': (lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A))), [A, 'group']),
    'blank group, no splits': (
        lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A)).drop(columns='split')), [A, 'group']),
    'unknown kind': (lambda f: edit(f, put(kind='bbox')), [A, 'bbox', 'the kinds are', 'boxes']),
    'unknown image label': (lambda f: edit(f, put(kind='image labels', image_labels='IRF;edema')),
                            [A, 'edema', 'IRF, SRF, PED']),
    'image labels, blank': (lambda f: edit(f, put(kind='image labels', image_labels='')),
                            [A, 'image_labels', 'background']),
    'present and absent': (lambda f: ((f/MASK).unlink(), edit(f, put(image_labels='IRF', absent_labels='IRF'))),
                           [A, 'present and as absent', 'remove']),
    'unknown class looked for': (lambda f: edit(f, put(looked_for='IRF;edema')), [A, 'edema', 'IRF, SRF, PED']),
    'unknown class in looked_for.txt': (lambda f: (f/'looked_for.txt').write_text('edema\n'),
                                        ['looked_for.txt', 'edema']),
    'unknown folder of masks': (lambda f: (f/'masks/edema').mkdir(), ['masks/edema', 'unknown', 'IRF, SRF, PED']),
    'no colour': (lambda f: (f/'colours.csv').write_text('class,red,green,blue\nIRF,300,0,0\n'),
                  ['colours.csv', '0 to 255']),
    'masks gone': (lambda f: shutil.rmtree(f/'masks'), ['mask', 'v00']),
    'no foreground': (lambda f: [save(m, np.zeros((32, 48), np.uint8)) for m in (f/'masks').iterdir()],
                      ['positive_only', 'foreground']),
    'a class twice': (lambda f: (f/'classes.txt').write_text('background\nIRF\nIRF\nPED\n'), ['classes.txt', 'IRF']),
    'a blank class': (lambda f: (f/'classes.txt').write_text('background\nIRF\n\nPED\n'), ['classes.txt']),
    'background last': (lambda f: (f/'classes.txt').write_text('IRF\nSRF\nPED\nbackground\n'), ['background', 'first']),
    'classes are an image': (lambda f: shutil.copy(f/IMAGE, f/'classes.txt'), ['classes.txt', 'not a text file']),
    'too few classes': (lambda f: (f/'classes.txt').write_text('background\nIRF\n'), ['masks/v000_s00.png', '0..1']),
    'image in colour': (lambda f: save(f/IMAGE, np.random.randint(0, 255, (32, 48, 3), np.uint8)),
                        [A, 'colour', 'channels=3']),
    'one mask for two pages': (lambda f: pages(f/IMAGE), [A, MASK, '1 slices', 'holds 2', 'agree']),
    'two pages of a mask': (lambda f: pages(f/MASK), [A, MASK, '2 pages']),
    'a page that is not there': (lambda f: (pages(f/IMAGE), pages(f/MASK), name(f, f'{A}/7')), ['row 8', 'no slice 7']),
    'mask of decimals': (lambda f: save(f/MASK, np.zeros((32, 48), np.float32), format='TIFF'), [A, 'whole numbers']),
    'mask as JPEG': (lambda f: save(f/MASK, np.zeros((32, 48), np.uint8), format='JPEG'), [A, 'JPEG', 'PNG']),
    'labels separated by blanks': (lambda f: edit(f, put(kind='image labels', image_labels='IRF SRF')),
                                   [A, "'IRF SRF'", ';']),
    'background alone': (lambda f: (f/'classes.txt').write_text('background\n'), ['class']),
    'box in shares': (lambda f: box(f, 'IRF', .1, .2, .3, .4),
                      ['boxes.csv row 2', A, '0..1', 'multiply x', 'relative']),
    'box of width 0': (lambda f: box(f, 'IRF', 3, 2, 3, 4), ['boxes.csv row 2', A, 'empty', 'x0 < x1']),
    'box outside': (lambda f: box(f, 'IRF', 1, 2, 300, 4), ['boxes.csv row 2', A, '300', 'leaves the image of 48x32']),
    'box inverted': (lambda f: box(f, 'IRF', 9, 2, 3, 4), ['boxes.csv row 2', A, 'inverted', 'x0 < x1']),
    'box with NaN': (lambda f: box(f, 'IRF', 1, 2, '', 4), ['boxes.csv row 2', A, 'not a number']),
    'box with text': (lambda f: box(f, 'IRF', 'a', 2, 3, 4), ['boxes.csv row 2', A, "'a'", 'number']),
    'box of an unknown class': (lambda f: box(f, 'drusen', 1, 2, 3, 4), ['boxes.csv row 2', 'drusen', 'IRF, SRF, PED']),
    'box of the background': (lambda f: box(f, 'background', 1, 2, 3, 4), [A, 'foreground classes are 1..3']),
    'box of no image': (lambda f: box(f, 'IRF', 1, 2, 3, 4, id='v9_s9'), ['boxes.csv row 2', 'v9_s9', 'add it']),
    'box of no tightness': (lambda f: table(f, 'boxes.csv', f'{BOX},tightness', (A, 'IRF', 1, 2, 3, 4, 'a bit')),
                            ['boxes.csv row 2', 'a bit', 'tight, loose']),
    'boxes as x, y, w, h': (lambda f: table(f, 'boxes.csv', 'id,class,x,y,w,h', (A, 'IRF', 1, 2, 3, 4)),
                            ['boxes.csv', 'lacks', 'x0, y0, x1, y1', 'it has id, class, x, y, w, h']),
    'unknown unit': (lambda f: table(f, 'boxes.csv', f'{BOX},unit', (A, 'IRF', 1, 2, 3, 4, 'mm')),
                     ['boxes.csv row 2', 'mm', 'pixels or relative']),
    'relative beyond 1': (lambda f: table(f, 'boxes.csv', f'{BOX},unit', (A, 'IRF', .1, .2, 3, 4, 'relative')),
                          ['boxes.csv row 2', '3.0', '0..1']),
    'point in shares': (lambda f: point(f, 'IRF', .5, .5), ['points.csv row 2', A, '0..1', 'relative']),
    'point outside': (lambda f: point(f, 'IRF', 48, 3), ['points.csv row 2', A, 'leaves the image of 48x32']),
    'point of no class': (lambda f: point(f, '', 8, 3), ['points.csv row 2', A, "class ''", 'IRF, SRF, PED']),
    'point that contradicts': (lambda f: points(f, ('IRF', 4, 5, 1), ('IRF', 4, 5, 0)),
                               [A, 'x=4, y=5 contradict', 'remove']),
    'a point outside the boxes': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='')),
                                             (f/'points.csv').write_text(f'{POINT}\n{A},IRF,20,20\n')),
                                  [f'id {A}', 'points.csv contradicts', 'boxes.csv', 'x=20, y=20', 'column kind']),
    'a label against the boxes': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='', image_labels='PED'))),
                                  [f'id {A}', 'boxes.csv and', 'labels.csv contradict', 'class 1', 'nowhere']),
    'boxes against a whole mask': (lambda f: (f/'boxes.csv').write_text(f'{BOX}\n{A},IRF,0,0,2,2\n'),
                                   [f'id {A}', MASK, 'boxes.csv', 'contradict']),
    'a kind of a pair is absent': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='boxes + points'))),
                                   [A, 'points', 'points.csv']),
    'marks on an id out of the folder': (lambda f: box(f, 'IRF', 1, 2, 9, 8, id='../../etc/passwd'),
                                         ['boxes.csv row 2', 'not in labels.csv']),
    'three extreme points': (lambda f: table(f, 'extreme_points.csv', f'{BOX},x2,y2', (A, 'IRF', *range(6))),
                             ['extreme_points.csv', 'lacks', 'x3, y3']),
    'stroke of two classes': (lambda f: strokes(f, (0, 'IRF', 3, 4), (0, 'SRF', 5, 6)), [A, 'stroke 0', 'two classes']),
    'strokes of another size': (lambda f: annotation(f, 'scribbles', np.ones((9, 9), np.uint8)),
                                [A, '(9, 9)', '(32, 48)']),
    'nobody drew': (lambda f: annotation(f, 'scribbles', np.full((32, 48), 255, np.uint8)),
                    [A, 'scribbles', 'nobody drew']),
    'certain alone': (lambda f: annotation(f, 'certain', np.ones((32, 48), np.uint8)),
                      [A, 'certain', 'is alone', 'possible']),
    'maps without thresholds': (lambda f: annotation(f, 'probabilities/IRF', np.ones((32, 48), np.uint8)),
                                ['thresholds.csv', 'class, core, rim']),
    'no validation': (lambda f: edit(f, move('valid', 'train')), ["'valid' is empty", 'group']),
    'no training': (lambda f: edit(f, move('train', 'test')), ["'train' is empty", 'group']),
    'unknown split': (lambda f: edit(f, move('valid', 'val')), ['val', 'train, valid, test']),
    'group on both sides': (lambda f: edit(f, put(split='valid')), ['group v003', 'both sides', 'one side']),
    'one patient': (lambda f: edit(f, lambda t: t.assign(group='p').drop(columns='split')),
                    ['1 group', 'cannot be split into train, 1 valid and 1 test']),
}

class Evil:
    "Unpickled, it would leave a file."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder/'pwned'),)

def files_in(folder): return {p: p.stat().st_mtime_ns for p in folder.rglob('*')}

@pytest.mark.parametrize('case', FILES)
def test_folder(folder, case):
    "One clear error before training, of less than ten lines, and the same in the report; nothing is written anywhere."
    spoil, words = FILES[case]
    spoil(folder)
    before = files_in(folder.parent)
    with pytest.raises((ValueError, OSError)) as e: start(folder)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'
    problems = '\n'.join(check_folder(folder).problems)
    for word in words * (case not in SOUND): assert word in problems, f'{word!r} is not in the report: {problems}'
    assert len(str(e.value).splitlines()) < 10 and files_in(folder.parent) == before

SOUND = {'no foreground', 'masks gone', 'one patient'}  # as folders: what fails is the training


# what looks broken and is not

def half(folder):
    image = np.array(Image.open(folder/IMAGE))
    return image, np.array(Image.open(folder/MASK))

def as_volume(folder):
    image, mask = half(folder)
    for where, pixels in (('images', image), ('masks', mask)):
        (folder/where/f'{A}.png').unlink()
        tifffile.imwrite(folder/where/f'{A}.tif', np.stack([pixels]*3), photometric='minisblack')
def as_colours(folder):
    colours = np.uint8([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    for file in (folder/'masks').iterdir(): save(file, colours[np.array(Image.open(file))])
    (folder/'colours.csv').write_text('class,red,green,blue\nbackground,0,0,0\nIRF,255,0,0\nSRF,0,255,0\nPED,0,0,255\n')
def as_class_folders(folder):
    for file in list((folder/'masks').iterdir()):
        mask = np.array(Image.open(file))
        for c, label in enumerate(['IRF', 'SRF', 'PED'], 1):
            (folder/'masks'/label).mkdir(exist_ok=True)
            if (mask == c).any(): save(folder/'masks'/label/file.name, np.uint8(255*(mask == c)))
        file.unlink()
def wipe(folder):
    for file in folder.rglob(f'masks/*/{A}.png'): file.unlink()
def as_big_endian(folder):
    image, _ = half(folder)
    (folder/IMAGE).unlink()
    tifffile.imwrite(folder/f'images/{A}.tif', image.astype('>u2')*200, byteorder='>')
def unknown_pixels(folder):
    mask = np.array(Image.open(folder/MASK))
    mask[:4] = 255
    save(folder/MASK, mask)
def encoded(encoding):
    def change(folder):
        for kind in ('images', 'masks'): (folder/kind/f'{A}.png').rename(folder/kind/'Müller 1.png')
        name(folder, 'Müller 1')
        text = (folder/'labels.csv').read_text()
        (folder/'labels.csv').write_bytes(text.encode(encoding))
    return change
def separated(sign): return lambda folder: edit_bytes(folder, b',', sign)
def renamed(new):
    def change(folder): [(folder/k/f'{A}.png').rename(folder/k/f'{A}{new}') for k in ('images', 'masks')]
    return change
def in_sub_folders(folder):
    for kind in ('images', 'masks'):
        (folder/kind/'p1').mkdir()
        (folder/kind/f'{A}.png').rename(folder/kind/'p1/1.png')
    name(folder, 'p1/1')
def converted(folder, suffix, **kwargs):
    Image.open(folder/IMAGE).save(folder/f'images/{A}{suffix}', **kwargs)
    (folder/IMAGE).unlink()
def row(cat, name=A): return cat.set_index('id').loc[name]
def known(a): return a.class_sets((32, 48), 4).known

HANDLED = {
    'a volume of three pages': (as_volume, lambda c: [i for i in c.id if A in i] == [f'{A}/{k}' for k in range(3)]),
    'masks in colours': (as_colours, lambda c: set(row(c).annotation.read().unique().tolist()) <= {0, 1, 2, 3}),
    'a file for each class': (as_class_folders,
                              lambda c: c.task.overlapping and row(c, 'v000_s00').annotation.kind == 'mask'),
    'no file of any class': (lambda f: (as_class_folders(f), wipe(f)),
                             lambda c: row(c).annotation.kind == 'unlabelled'),
    'no file, but looked for': (lambda f: (as_class_folders(f), wipe(f), edit(f, put(kind='mask'))),
                                lambda c: known(row(c).annotation).all()),
    'a big-endian image': (as_big_endian, lambda c: len(c) == 10),
    'unknown pixels': (unknown_pixels,
                       lambda c: not known(row(c).annotation)[:4].any() and known(row(c).annotation)[4:].all()),
    'masks of 0 and 255': (lambda f: whiten(f, ['background', 'fluid']), lambda c: known(row(c).annotation).all()),
    'masks of 0 and 255, no list': (lambda f: whiten(f, []), lambda c: c.task.classes == ('background', 'foreground')),
    'UTF-16': (encoded('utf-16'), lambda c: row(c, 'Müller 1').annotation.kind == 'mask'),
    'latin-1': (encoded('latin-1'), lambda c: row(c, 'Müller 1').annotation.kind == 'mask'),
    'UTF-8 with a mark': (encoded('utf-8-sig'), lambda c: row(c, 'Müller 1').annotation.kind == 'mask'),
    'semicolons': (separated(b';'), lambda c: len(c) == 10),
    'tabs': (separated(b'\t'), lambda c: len(c) == 10),
    'classes in latin-1': (lambda f: (f/'classes.txt').write_bytes('background\nÖdem\nSRF\nPED\n'.encode('latin-1')),
                           lambda c: c.task.classes[1] == 'Ödem'),
    'capital suffixes': (renamed('.PNG'), lambda c: row(c).annotation.kind == 'mask'),
    'a JPEG image': (lambda f: converted(f, '.jpg', quality=95), lambda c: row(c).annotation.kind == 'mask'),
    'a BMP image': (lambda f: converted(f, '.bmp'), lambda c: row(c).annotation.kind == 'mask'),
    'ids with suffix': (lambda f: name(f, f'{A}.png'), lambda c: row(c).annotation.kind == 'mask'),
    'ids in sub-folders': (in_sub_folders, lambda c: row(c, 'p1/1').annotation.kind == 'mask'),
    'relative boxes': (lambda f: table(f, 'boxes.csv', f'{BOX},unit', (A, 'IRF', .25, .5, .5, 1, 'relative')),
                       lambda c: row(c).annotation == Boxes([(1, 12, 16, 24, 32)])),
    'decimal commas': (lambda f: (table(f, 'boxes.csv', ''), (f/'boxes.csv').write_text(
        f'id;class;x0;y0;x1;y1\n{A};IRF;1,5;2;3;4,25\n')),
                    lambda c: row(c).annotation == Boxes([(1, 1.5, 2, 3, 4.25)])),
    'tight and loose': (lambda f: table(f, 'boxes.csv', f'{BOX},tightness', (A, 'IRF', 1, 2, 3, 4, 'tight'),
                                        (A, 'SRF', 5, 6, 7, 8, 'loose')),
                    lambda c: row(c).annotation.tight == [True, False]),
    'a point that denies': (lambda f: points(f, ('IRF', 4, 5, 1), ('SRF', 7, 8, 0)),
                            lambda c: row(c).annotation == Points([(1, 4, 5)], exhaustive=False, absent=[(2, 7, 8)])),
    'absent labels': (lambda f: ((f/MASK).unlink(), edit(f, put(image_labels='IRF', absent_labels='SRF'))),
                      lambda c: row(c).annotation == ImageLabels([1], absent=[2])),
    'part of the classes': (lambda f: edit(f, put(looked_for='IRF')),
                            lambda c: row(c).annotation.kind == 'partial mask'),
    'boxes of part of the classes': (lambda f: (box(f, 'IRF', 1, 2, 3, 4), edit(f, put(looked_for='IRF'))),
                                     lambda c: row(c).annotation.class_sets((32, 48), 4)[1, 31, 47] == 0b1101),
    'two kinds, one named': (lambda f: ((f/'boxes.csv').write_text(f'id,class,x0,y0,x1,y1\n{A},IRF,1,2,3,4\n'),
                                        edit(f, put(kind='boxes'))), lambda c: row(c).annotation.kind == 'boxes'),
    'boxes and points': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='')),
                                    (f/'points.csv').write_text(f'{POINT}\n{A},IRF,4,5\n')),
                         lambda c: row(c).annotation.class_sets((32, 48), 4)[:2, 5, 4].tolist() == [2, 2]),
    'boxes and a label that follows': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='', image_labels='IRF'))),
                                       lambda c: row(c).annotation.kind == 'boxes + image labels'),
    'a partial mask and points': (lambda f: (save(f/MASK, np.uint8(np.array(Image.open(f/MASK)) == 1)),
                                             edit(f, put(looked_for='IRF')),
                                             (f/'points.csv').write_text(f'{POINT}\n{A},PED,0,31\n')),
                                  lambda c: row(c).annotation.kind == 'partial mask + points'),
    'a link to a folder of images elsewhere': (lambda f: link_outside(f, 'images'), lambda c: len(c) == 10),
    'images that are not listed': (lambda f: shutil.copy(f/IMAGE, f/'images/extra.png'), lambda c: len(c) == 10),
    'folders with blanks and apostrophes': (lambda f: None, lambda c: len(c) == 10),
}

@pytest.mark.parametrize('case', HANDLED)
def test_handled(folder, case):
    change, right = HANDLED[case]
    change(folder)
    if 'apostrophes' in case: folder = folder.rename(folder.parent/"my patients' eyes")
    before = files_in(folder.parent)
    assert right(read_folder(folder)) and files_in(folder.parent) == before
    assert check_folder(folder).problems == []

def test_the_example_becomes_a_batch(tmp_path):
    "Every kind of annotation, in batches that hold each of them."
    cat = read_folder(save_example(tmp_path/'example', size=32))
    dls = make_dataloaders(cat, bs=22, iterations=2)
    assert set(dls.quota) == {a.kind for a in cat.annotation}
    assert dls.one_batch()[1].shape == (sum(dls.quota.values()), 3, 32, 32)

def test_folders_for_different_structures_become_one_batch(pristine, tmp_path):
    "Three hospitals drew a fluid each; of the two others, which nobody looked for, nothing is ruled out."
    parts = {}
    for c, label in enumerate(['IRF', 'SRF', 'PED'], 1):
        part = shutil.copytree(pristine, tmp_path/label)
        for file in (part/'masks').iterdir(): save(file, np.uint8(np.array(Image.open(file)) == c))
        (part/'classes.txt').write_text(f'background\n{label}\n')
        parts[label] = read_folder(part)
    cat = join_catalogues(parts)
    assert cat.task.classes == ('background', 'IRF', 'SRF', 'PED') and cat.group.nunique() == 15
    dls = make_dataloaders(cat, bs=8, iterations=6, tfms=[], seed=0)
    sets = torch.cat([y for _, y in dls.train])
    assert set(sets[:, 0].unique().tolist()) <= {0, 2, 4, 8} and {0b1101, 0b1011, 0b0111} <= set(sets[:, 1].unique().tolist())

def test_a_volume_becomes_a_batch(folder):
    as_volume(folder)
    assert start(folder).one_batch()[0].shape == (8, 1, 32, 48)

def test_a_copy_in_another_group_is_noted(folder):
    shutil.copy(folder/IMAGE, folder/'images/v004_s00.png')
    notes = '\n'.join(check_folder(folder).notes)
    assert f'images {A} and v004_s00 have the same pixels' in notes

def test_all_problems_at_once(folder):
    "Whoever makes one mistake often makes it everywhere; the first seven are spelt out, and all in the report."
    for file in (folder/'images').iterdir(): cut(file)
    for file in (folder/'masks').iterdir(): file.unlink()
    edit(folder, lambda t: t.assign(kind='mask', split='val').assign(group=t.group.where(t.id != A)))
    with pytest.raises(ValueError) as e: read_folder(folder)
    lines = str(e.value).splitlines()
    assert lines[0] == '24 problems:' and len(lines) == 9 and lines[-1] == '... and 17 more'
    assert f'row 8 ({A}): group is blank' in lines[1]
    lines = check_folder(folder).problems
    assert sum('cannot be read' in l for l in lines) == 10 and sum('the kind is mask' in l for l in lines) == 10
    assert sum("'train' is empty" in l or "'valid' is empty" in l or "['val'] is unknown" in l for l in lines) == 3

def test_a_long_list_is_cut(folder):
    edit(folder, lambda t: pd.concat([t]*4).assign(id=[f'x{i}' for i in range(40)]))
    with pytest.raises(ValueError) as e: read_folder(folder)
    lines = str(e.value).splitlines()
    assert lines[0] == '40 problems:' and len(lines) == 9 and lines[-1] == '... and 33 more'


# what is no mistake

def test_a_patient_called_na(folder):
    edit(folder, lambda t: t.assign(group=t.group.replace('v003', 'NA')))
    assert set(read_folder(folder).group) == {'v000', 'v001', 'v002', 'NA', 'v004'}

@pytest.mark.parametrize('text', ['\ufeffbackground\nIRF\nSRF\nPED\n', 'background  \r\nIRF \r\nSRF\r\nPED\r\n\r\n'])
def test_marks_and_blanks_in_a_list_of_classes(folder, text):
    (folder/'classes.txt').write_bytes(text.encode())
    assert read_folder(folder).task.classes == ('background', 'IRF', 'SRF', 'PED')

def test_a_byte_order_mark_and_blanks_in_a_table(folder):
    file = folder/'labels.csv'
    text = file.read_text().replace('id,group,', 'id , group ,', 1).replace('train', ' train ')
    file.write_bytes(('\ufeff' + text).encode())
    assert read_folder(folder).split.value_counts().to_dict() == {'train': 6, 'valid': 2, 'test': 2}

def test_leading_zeros_of_an_id_stay(folder):
    for kind in ('images', 'masks'): (folder/kind/f'{A}.png').rename(folder/kind/'007.png')
    edit(folder, lambda t: t.assign(id=t.id.replace(A, '007')))
    assert '007' in set(read_folder(folder).id)

def test_class_names_of_several_words(folder):
    (folder/'classes.txt').write_text('background\nLung Opacity\nPleural Effusion\nPED\n')
    (folder/MASK).unlink()
    edit(folder, put(image_labels='Pleural Effusion;Lung Opacity'))
    assert read_folder(folder).annotation[6].classes == [2, 1]

def test_a_blank_says_nothing_and_background_says_healthy(folder):
    for i in (A, 'v003_s01'): (folder/'masks'/f'{i}.png').unlink()
    edit(folder, lambda t: t.assign(image_labels=np.where(t.id == A, 'background', '')))
    healthy, blank = read_folder(folder).annotation[6:8]
    assert healthy.class_sets((4, 4), 4).known.all() and not blank.class_sets((4, 4), 4).known.any()

def test_masks_numbered_without_a_list(folder):
    (folder/'classes.txt').unlink()
    assert read_folder(folder).task.classes == ('background', 'class 1', 'class 2', 'class 3')

def test_a_mixed_folder_trains_without_a_mask_for_every_image(folder):
    "From the folder to a batch: masks, boxes, image labels and nothing."
    for i in ('v002_s00', 'v002_s01', 'v003_s00', 'v003_s01'): (folder/'masks'/f'{i}.png').unlink()
    (folder/'boxes.csv').write_text('id,class,x0,y0,x1,y1\nv002_s00,IRF,1,2,9,8\n')
    edit(folder, lambda t: t.drop(columns='split').assign(image_labels=np.where(t.id == 'v002_s01', 'IRF; PED', '')))
    cat = split_groups(read_folder(folder), seed=1)
    kinds = cat.annotation.map(lambda a: a.kind).value_counts().to_dict()
    assert kinds == {'mask': 6, 'unlabelled': 2, 'boxes': 1, 'image labels': 1}
    dls = make_dataloaders(cat, bs=6, iterations=3)
    assert 'unlabelled' in dls.quota and dls.one_batch()[1].shape == (sum(dls.quota.values()), 3, 32, 48)

def test_observations_are_the_task_of_whole_images(folder):
    (folder/'observations.txt').write_text('IRF\nSRF\n')
    cat = read_folder(folder, unit='image')
    assert cat.task == Task(['IRF', 'SRF'], unit='image')
    assert make_dataloaders(cat, bs=4, iterations=2).one_batch()[1].shape == (4, 2)
    edit(folder, put(IRF='yes'))
    for unit in ('pixel', 'image'):
        with pytest.raises(ValueError, match=f"labels.csv, column 'IRF', id {A}: yes is not a label"):
            read_folder(folder, unit=unit)

def test_no_observations(folder):
    (folder/'observations.txt').unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match='observations.txt does not exist'): read_folder(folder, unit='image')
    with pytest.raises(ValueError, match="label column 'Drusen' is missing"):
        read_folder(folder, ['Drusen'], unit='image')

def test_class_sets_overlap(folder):
    (folder/'masks').rename(folder/'masks_bits')
    for file in (folder/'masks_bits').iterdir(): save(file, (1 << np.array(Image.open(file))).astype(np.uint16))
    cat = read_folder(folder)
    assert task_of(cat).overlapping and all(a.bits for a in cat.annotation)
    (folder/'classes.txt').unlink()
    with pytest.raises(FileNotFoundError, match="masks_bits does: write the name of each bit's class"):
        read_folder(folder)


# catalogues of one's own

def test_a_table_without_a_task(folder):
    rows = pd.DataFrame(read_folder(folder))
    for use in (check_catalogue, make_dataloaders, lambda r: simulate_budget(r, 1, 'boxes')):
        with pytest.raises(ValueError, match='the table has no task: make a catalogue of it'): use(rows)

def test_names_of_groups_may_be_anything(folder):
    cat = read_folder(folder)
    check_catalogue(Catalogue(cat.assign(group=range(10), split=['train', 'valid']*5)).set_index('id', drop=False))


# weak annotations

@pytest.mark.parametrize('kind,words', [('boxes', ['boxes.csv']), ('image labels', ["'image_labels'"])])
def test_a_kind_without_its_data(folder, kind, words):
    ("A whole column of kind 'boxes' but no boxes.csv: "
     "to take every image for healthy would teach background everywhere.")
    edit(folder, lambda t: t.assign(kind=np.where(t.group == 'v003', kind, 'mask')))
    with pytest.raises(ValueError) as e: read_folder(folder)
    for word in words: assert word in str(e.value)

def weak(folder, where):
    def annotation(t): return [Unlabelled() if w else a for w, a in zip(where(t), t.annotation)]
    return read_folder(folder).assign(annotation=annotation)

def test_no_training_mask(folder):
    with pytest.raises(ValueError, match='no training image has a mask'):
        make_dataloaders(weak(folder, lambda t: t.split == 'train'))

def test_nothing_to_validate_on(folder):
    with pytest.raises(ValueError, match='validation image v000_s00'):
        make_dataloaders(weak(folder, lambda t: t.split == 'valid'))

def test_part_of_the_validation_images_says_nothing(folder):
    with pytest.warns(UserWarning, match='leaves out 1 images of whose pixels nothing is known: v000_s01'):
        dls = make_dataloaders(weak(folder, lambda t: t.id == 'v000_s01'))
    assert len(dls.valid_ds) == 1

@pytest.mark.parametrize('quota,word', [
    (dict(mask=2), 'no quota for'), (dict(mask=2, unlabelled=2, boxes=1), 'boxes'),
    (dict(mask=0, unlabelled=2), 'at least 1')])
def test_quota(folder, quota, word):
    with pytest.raises(ValueError, match=word): make_dataloaders(weak(folder, lambda t: t.group == 'v003'), quota=quota)

def test_images_of_several_sizes_without_a_size(folder):
    for kind in ('images', 'masks'):
        file = folder/kind/f'{A}.png'
        Image.open(file).resize((40, 40), Image.NEAREST).save(file)
    with pytest.raises(ValueError, match=f'several sizes.*{A}.*give `size`'):
        make_dataloaders(read_folder(folder), bs=8, iterations=3)
    dls = make_dataloaders(read_folder(folder), bs=8, iterations=3, size=(32, 32))
    assert dls.one_batch()[0].shape == (8, 1, 32, 32)

# what is typed wrongly in Python

def loaders(folder, **kwargs):
    return make_dataloaders(read_folder(folder, check=False), **dict(bs=2, iterations=1, device='cpu') | kwargs)
def learner(folder, **kwargs): return make_learner(loaders(folder), **dict(network=dict(width=2, depth=2)) | kwargs)
def trained(folder, **kwargs): return fit(learner(folder), **dict(epochs=1, bar=False) | kwargs)
def put_pickle(file):
    file.write_bytes(pickle.dumps(Evil(file.parent)))
    return file

TYPED = {
    'no images in a batch': (lambda f: loaders(f, bs=0), 'bs=0'),
    'no iterations': (lambda f: loaders(f, iterations=0), 'iterations=0: a number from 1'),
    'one number as size': (lambda f: loaders(f, size=64), r'size=64: give \(height, width\)'),
    'an image of no height': (lambda f: loaders(f, size=(0, 64)), 'height=0: a number from 1'),
    'an image beyond belief': (lambda f: loaders(f, size=(64, 10**6)), 'width=1000000'),
    'fewer workers than none': (lambda f: loaders(f, num_workers=-1), 'num_workers=-1'),
    'a negative learning rate': (lambda f: trained(f, lr=-1), 'lr=-1: a number from 1e-09 to 1'),
    'a learning rate of zero': (lambda f: trained(f, lr=0), 'lr=0'),
    'a learning rate that is none': (lambda f: trained(f, lr=float('nan')), 'lr=nan'),
    'a learning rate as text': (lambda f: trained(f, lr='.01'), "lr='.01'"),
    'no epochs': (lambda f: trained(f, epochs=0), 'epochs=0'),
    'twice the training as warm-up': (lambda f: trained(f, warmup=2), 'warmup=2'),
    'a backward trunk': (lambda f: trained(f, trunk_lr_mult=-1), 'trunk_lr_mult=-1'),
    'a network of no width': (lambda f: learner(f, network=dict(width=0)), 'width=0'),
    'a network of no depth': (lambda f: learner(f, network=dict(depth=0)), 'depth=0'),
    'an unknown encoder': (lambda f: learner(f, network=dict(encoder='resnot')), "no network 'resnot'"),
    'an unknown teacher': (lambda f: learner(f, teacher='me'), "teacher='me' is unknown: choose one of"),
    'an unknown supervision': (lambda f: learner(f, aux_supervision='all'), "'all' is unknown: choose one of"),
    'a negative weight': (lambda f: learner(f, loss=dict(dice=-1)), 'dice=-1'),
    'a decay above 1': (lambda f: learner(f, teaching=dict(decay=2)), 'decay 2 is outside 0..1'),
    'a confidence above 1': (lambda f: learner(f, teaching=dict(threshold=7)), 'threshold=7'),
    'a share above 1': (lambda f: learner(f, teaching=dict(cutmix=3)), 'cutmix=3'),
    'a start after the end': (lambda f: learner(f, teaching=dict(start=2)), 'start=2'),
    'nothing to start from': (lambda f: learner(f, start=f/'none.safetensors'), 'there is no model at'),
    'a pickle to start from': (lambda f: learner(f, start=put_pickle(f/'m.safetensors')), 'is not a safetensors file'),
    'a pickle as checkpoint': (lambda f: trained(f, checkpoint=put_pickle(f/'c.pt')), 'is not a checkpoint'),
    'a pickle as model': (lambda f: load_model(put_pickle(f/'m.safetensors')), 'is not a safetensors file'),
    'half precision on a processor': (lambda f: mixed_precision('fp16'), "precision='fp16' needs a GPU"),
    'a negative share': (lambda f: split_groups(read_folder(f), -1), 'valid=-1'),
}

@pytest.mark.parametrize('case', TYPED)
def test_typed(folder, case):
    "Refused before a training, in one sentence that names the argument; nothing is unpickled."
    if 'half' in case and torch.cuda.is_available(): pytest.skip('there is a GPU')
    do, words = TYPED[case]
    with pytest.raises((ValueError, OSError), match=words): do(folder)
    assert not (folder/'pwned').exists()

def test_a_loss_that_is_lost_is_named(folder):
    learn = learner(folder)
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with pytest.warns(UserWarning, match='the loss is no number any more'): fit(learn, epochs=1, bar=False)


BUDGETS = {
    'more masks than images': (dict(masks=99), ['99', 'training has 6', "'all'"]),
    'half an image': (dict(masks=1.5), ['1.5']),
    'no mask': (dict(masks=0), ['masks=0', '1..6']),
    'larger pool than there is': (dict(pool=99), ['pool=99', 'training has 6']),
    'unknown kind': (dict(masks=1, kind='box'), ["'box'", 'boxes']),
    'unknown order': (dict(masks=1, by='patients'), ["'patients'", 'groups']),
}

@pytest.mark.parametrize('case', BUDGETS)
def test_budget(folder, case):
    given, words = BUDGETS[case]
    with pytest.raises(ValueError) as e: simulate_budget(read_folder(folder), **given)
    for word in words: assert word in str(e.value)

@pytest.mark.parametrize('valid, test, words', [
    (0, .2, "'valid' is empty"), (.6, .6, '5 groups cannot be split.*smaller shares')])
def test_shares(folder, valid, test, words):
    with pytest.raises(ValueError, match=words): make_dataloaders(split_groups(read_folder(folder), valid, test))

def test_classes_that_the_masks_do_not_have(folder):
    with pytest.raises(ValueError, match='2 classes.*0..1'): read_folder(folder, ['background', 'IRF'])

def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match='/no/such/folder/labels.csv does not exist'):
        read_folder('/no/such/folder')
