"""Bad folders as a user meets them: one error before any training, which names file and row, and the remedy.

A case breaks a small dataset folder and lists the words that the error must hold; what looks broken and is not has a
table of its own, with what must be read. `nbs/howto/mistakes.ipynb` shows all of them to users; `python
tests/test_bad_input.py` writes what it says of them."""
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import nbformat
import pandas as pd
import pytest
import SimpleITK as sitk
import tifffile
import torch
from conftest import ROOT
from PIL import Image

from mlds.annotations import Boxes, ImageLabels, Points, Unlabelled
from mlds.catalogue import Catalogue, check_catalogue, simulate_budget, split_groups, task_of
from mlds.folders import check_folder, join_catalogues, read_folder, save_example
from mlds.dataloaders import make_dataloaders
from mlds.files import image_size, read_image
from mlds.learner import fit, make_learner, mixed_precision
from mlds.models import load_model
from mlds.phantoms.oct import oct_phantoms, save_phantoms
from mlds.sources.chest import check_data, read_data
from mlds.sources import tools # reads what lies in annotations/
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
def text(folder, change, file='labels.csv'): (folder/file).write_text(change((folder/file).read_text()))
def classes(folder, words): (folder/'classes.txt').write_text(words)
def mask_of(folder): return np.array(Image.open(folder/MASK))
def each_mask(folder, change):
    for file in (folder/'masks').iterdir(): save(file, change(np.array(Image.open(file))))
def image_as_tiff(folder, pixels, **kwargs):
    (folder/IMAGE).unlink()
    tifffile.imwrite(folder/f'images/{A}.tif', pixels, **kwargs)
def mask_as_tiff(folder, pixels):
    (folder/MASK).unlink()
    tifffile.imwrite(folder/f'masks/{A}.tif', pixels)
def flip_byte(file, at): file.write_bytes(bytes(b ^ 255 if i == at else b for i, b in enumerate(file.read_bytes())))
def as_nifti(folder, **of_mask):
    "A volume of three slices, whose mask may have a header of its own."
    for where, header in (('images', {}), ('masks', of_mask)):
        volume = sitk.GetImageFromArray(np.stack([np.array(Image.open(folder/where/f'{A}.png'))]*3))
        volume.SetSpacing(header.get('spacing', (.02, .01, .1)))
        volume.SetDirection(header.get('directions', (1, 0, 0, 0, 1, 0, 0, 0, 1)))
        (folder/where/f'{A}.png').unlink()
        sitk.WriteImage(volume, folder/where/f'{A}.nii.gz')
def blank(folder, *slices, of=('images', 'masks')):
    "The volume, some of whose slices hold one value."
    as_nifti(folder)
    for where in of:
        file = folder/where/f'{A}.nii.gz'
        volume = sitk.ReadImage(file)
        for k in slices: volume[:, :, k] = 0
        sitk.WriteImage(volume, file)
def a_mask_each(folder, *slices):
    "The volume, with a mask file for some of its slices; the table lists the first two."
    mask = mask_of(folder)
    as_nifti(folder)
    (folder/f'masks/{A}.nii.gz').unlink()
    (folder/f'masks/{A}').mkdir()
    for k in slices: save(folder/f'masks/{A}/{k}.png', mask)
    edit(folder, lambda t: pd.concat([t[t.id != A], *(t[t.id == A].assign(id=f'{A}/{k}') for k in range(2))]))
def rename(folder, new, said=None):
    "Call an image by another name, in labels.csv perhaps by one that differs."
    for where in ('images', 'masks'): (folder/where/f'{A}.png').rename(folder/where/f'{new}.png')
    name(folder, said or new)
def said_of(folder, **columns):
    (folder/MASK).unlink()
    edit(folder, put(kind='image labels', **columns))
def maps(folder, cuts, pixels=np.full((32, 48), 100, np.uint8)):
    "Another model's map of a class, with thresholds."
    (folder/MASK).unlink()
    (folder/'probabilities/IRF').mkdir(parents=True)
    tifffile.imwrite(folder/f'probabilities/IRF/{A}.tif', pixels)
    (folder/'thresholds.csv').write_text(f'class,core,rim\nIRF,{cuts}\n')
def colours(folder, *rows):
    as_colours(folder)
    (folder/'colours.csv').write_text('\n'.join(['class,red,green,blue', *rows]) + '\n')
def export(folder, content, file='a.json'):
    "What is not quite the export of an annotation tool."
    (folder/MASK).unlink()
    (folder/'annotations').mkdir()
    (folder/'annotations'/file).write_bytes(content if isinstance(content, bytes) else content.encode())
def coco(folder, label='IRF', width=48, height=32):
    image = dict(id=1, file_name=f'{A}.png', width=width, height=height)
    shape = dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 5, 6], iscrowd=0, area=30)
    export(folder, json.dumps(dict(images=[image], annotations=[shape], categories=[dict(id=1, name=label)])))
def laughs():
    "Ten thousand million words in a few lines."
    lines = ''.join(f'<!ENTITY {chr(98+i)} "{f"&{chr(97+i)};"*10}">' for i in range(9))
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "lol">{lines}]><annotations>&j;</annotations>'
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
    'labels.csv is a folder': (lambda f: ((f/'labels.csv').unlink(), (f/'labels.csv').mkdir()), ['labels.csv', 'is a folder', 'CSV file']),
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
    'a loose box of the kind tight boxes': (
        lambda f: table(f, 'boxes.csv', f'{BOX},tightness', (A, 'IRF', 1, 2, 3, 4, 'loose'), kind='tight boxes'),
                                            ['boxes.csv row 2', A, 'tightness is loose', 'tight boxes', 'correct']),
    'tight and loose boxes in one kind': (
        lambda f: table(f, 'boxes.csv', BOX, (A, 'IRF', 1, 2, 3, 4), kind='tight boxes + loose boxes'),
                                          [f'id {A}', 'tight boxes and loose boxes', 'column tightness']),
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
    'no validation': (lambda f: edit(f, move('valid', 'train')), ['labels.csv', "'valid' is empty", 'group']),
    'no training': (lambda f: edit(f, move('train', 'test')), ["'train' is empty", 'group']),
    'unknown split': (lambda f: edit(f, move('valid', 'val')), ['val', 'train, valid, test']),
    'group on both sides': (lambda f: edit(f, put(split='valid')), ['group v003', 'both sides', 'one side']),
    'one patient': (lambda f: edit(f, lambda t: t.assign(group='p').drop(columns='split')),
                    ['1 group', 'cannot be split into train, 1 valid and 1 test']),
    # what tables look like
    'columns in capitals': (lambda f: text(f, lambda t: t.replace('id,group', 'ID,Group', 1)),
                            ['labels.csv', 'lacks the column(s) id, group', 'it has ID, Group']),
    'no line of names': (lambda f: text(f, lambda t: t.split('\n', 1)[1]), ['labels.csv', 'a first line of names']),
    'a second line of names': (lambda f: text(f, lambda t: t + t.split('\n')[0] + '\n'), ['id id', 'is not a label']),
    'fewer cells than columns': (lambda f: text(f, lambda t: re.sub(f'(?m)^{A}.*$', f'{A},v003', t)),
                                 ['split is blank for 1 images', 'write train, valid or test']),
    'a quote that is not closed': (lambda f: text(f, lambda t: t.replace(A, f'"{A}')), ['labels.csv', 'never closed']),
    'a workbook as table': (lambda f: (f/'labels.csv').write_bytes(b'PK\3\4' + bytes(range(256))),
                            ['labels.csv', 'not a text file', 'save it as CSV UTF-8']),
    'a workbook beside': (lambda f: (f/'labels.csv').rename(f/'labels.xlsx'),
                          ['labels.csv does not exist', 'there is labels.xlsx: save it as labels.csv']),
    'a table in capitals': (lambda f: (f/'labels.csv').rename(f/'Labels.csv'), ['there is Labels.csv']),
    'a web page as table': (lambda f: (f/'labels.csv').write_text('<!DOCTYPE html><body>Sign in</body>'),
                            ['labels.csv', 'lacks', '<!DOCTYPE html>']),
    'UTF-16 without its mark': (
        lambda f: (f/'labels.csv').write_bytes((f/'labels.csv').read_text().encode('utf-16-le')),
                                ['labels.csv', 'not a text file']),
    'a placeholder of Git LFS': (lambda f: [x.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\n')
                                            for x in (f/IMAGE, f/MASK)], [A, IMAGE, 'cannot be read', 'git lfs pull']),
    # names
    'id with its folder': (lambda f: name(f, f'images/{A}.png'), ['row 8', f'images/images/{A}', 'does not exist']),
    'id in capitals': (lambda f: name(f, A.upper()), ['row 8', f'there is {A}.png: capitals count']),
    'id of a folder': (lambda f: ((f/'images/sub').mkdir(), name(f, 'sub')), ['row 8', 'images/sub does not exist']),
    'a folder called mask': (lambda f: (f/'masks').rename(f/'mask'), ['mask is not read: call it masks']),
    'a folder called Masks': (lambda f: (f/'masks').rename(f/'Masks'), ['Masks is not read: call it masks']),
    'a folder called image': (lambda f: (f/'images').rename(f/'image'),
                              ['images does not exist', 'image is not read: call it images']),
    'images in an archive': (lambda f: (shutil.make_archive(f/'images', 'zip', f/'images'), shutil.rmtree(f/'images')),
                             ['images does not exist', 'images.zip is not read']),
    'boxes in bboxes.csv': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='')),
                                       (f/'boxes.csv').rename(f/'bboxes.csv')), ['bboxes.csv', 'call it boxes.csv']),
    'boxes in boxes.txt': (lambda f: (box(f, 'IRF', 1, 2, 9, 8), edit(f, put(kind='')),
                                      (f/'boxes.csv').rename(f/'boxes.txt')), ['boxes.txt', 'call it boxes.csv']),
    'a volume and one of its slices': (
        lambda f: (as_nifti(f), edit(f, lambda t: pd.concat([t, t[t.id == A].assign(id=f'{A}/1')]))),
                                       ['labels.csv', f'{A}/1 is a slice of a volume that has a row']),
    'a mask of a slice that is not there': (lambda f: a_mask_each(f, 0, 3),
                                            [f'masks/{A}/3.png', 'belongs to no image', 'rename']),
    'a blank slice that is listed': (
        lambda f: (blank(f, 0), edit(f, lambda t: pd.concat([t[t.id != A], *(t[t.id == A].assign(id=f'{A}/{k}')
                                                                              for k in range(3))]))),
                                     [f'id {A}/0', f'{A}.nii.gz, slice 0, is constant', 'name the other slices']),
    'a volume of blank slices': (lambda f: blank(f, 0, 1, 2),
                                 ['all 3 slices of', f'images/{A}.nii.gz', 'constant', 'remove it from']),
    'a structure on a blank slice': (
        lambda f: (save(f/MASK, np.eye(32, 48, dtype=np.uint8)), blank(f, 0, of=['images'])),
                                     [f'id {A}/0', f'masks/{A}.nii.gz', 'marks a structure', 'turned or shifted']),
    # files
    'a web page as image': (lambda f: (f/IMAGE).write_text('<!DOCTYPE html>'), [A, IMAGE, 'cannot be read']),
    'an empty image': (lambda f: (f/IMAGE).write_bytes(b''), [A, IMAGE, 'cannot be read']),
    'an empty mask': (lambda f: (f/MASK).write_bytes(b''), [A, MASK, 'cannot be read']),
    'a folder as image': (lambda f: ((f/IMAGE).unlink(), (f/IMAGE).mkdir()), [A, 'does not exist', 'is none of them']),
    'a folder as mask': (lambda f: ((f/MASK).unlink(), (f/MASK).mkdir()), [f'masks/{A}.png', 'is unknown']),
    'a link to nothing': (lambda f: ((f/IMAGE).unlink(), (f/IMAGE).symlink_to('gone.png')), [A, 'does not exist']),
    'a link to itself': (lambda f: ((f/IMAGE).unlink(), (f/IMAGE).symlink_to(f/IMAGE)), [A, 'does not exist']),
    'a pipe as image': (lambda f: ((f/IMAGE).unlink(), os.mkfifo(f/IMAGE)), [A, 'does not exist']),
    'a drawing as image': (lambda f: ((f/IMAGE).unlink(), (f/f'images/{A}.svg').write_text('<svg/>')),
                           [A, f'{A}.svg is none of them']),
    'a byte that was changed': (lambda f: flip_byte(f/IMAGE, 80), [A, IMAGE, 'cannot be read', 'replace']),
    'infinite image': (lambda f: save(f/IMAGE, np.float32([[1, np.inf], [0, 3]]), format='TIFF'),
                       [A, IMAGE, 'infinite', 'remove']),
    'complex numbers': (lambda f: image_as_tiff(f, np.random.rand(32, 48).astype(np.complex64)),
                        [A, 'complex numbers', 'magnitude']),
    'one pixel': (lambda f: (save(f/IMAGE, np.uint8([[3]])), save(f/MASK, np.uint8([[0]]))), [A, 'constant']),
    'image in ink colours': (lambda f: ((f/IMAGE).unlink(), Image.fromarray(np.random.randint(
        0, 255, (32, 48, 4), np.uint8), 'CMYK').save(f/f'images/{A}.jpg')), [A, 'in colour', 'channels=3']),
    'two channels': (lambda f: image_as_tiff(f, np.random.randint(0, 255, (32, 48, 2), np.uint8),
                                             planarconfig='contig', photometric='minisblack'), [A, '2 channels']),
    # masks
    'mask with opacity': (lambda f: save(f/MASK, np.dstack([mask_of(f)]*4)), [A, MASK, '4 channels']),
    'mask of grey and opacity': (lambda f: save(f/MASK, np.dstack([mask_of(f)]*2)), [A, MASK, '2 channels']),
    'ids beyond 255': (lambda f: save(f/MASK, np.full((32, 48), 300, np.uint16)), [A, MASK, '300', '0..3']),
    'negative ids': (lambda f: mask_as_tiff(f, np.full((32, 48), -1, np.int16)), [A, '-1', '0..3']),
    'mask on its side': (lambda f: save(f/MASK, mask_of(f).T), [A, MASK, '(48, 32)', '(32, 48)', 'agree']),
    'ids 10, 20, 30': (lambda f: each_mask(f, lambda m: m*10), ['masks/v000_s00.png', '0..30', '0..3']),
    'ids 10, 20, 30 without names': (lambda f: (each_mask(f, lambda m: m*10), (f/'classes.txt').unlink()),
                                     ['[0, 10, 20, 30]', 'class ids count up from 0', 'classes.txt']),
    'ids from 1': (lambda f: each_mask(f, lambda m: m + 1), ['masks/v000_s00.png', '1..4', '0..3']),
    'images as masks': (lambda f: [shutil.copy(i, f/'masks'/i.name) for i in (f/'images').iterdir()],
                        ['masks/v000_s00.png', 'class ids', '0..3']),
    'masks as images': (lambda f: [shutil.copy(m, f/'images'/m.name) for m in (f/'masks').iterdir()],
                        [IMAGE, 'is constant']),
    'mask mirrored in its header': (lambda f: as_nifti(f, directions=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
                                    [A, 'directions', 'resample', "the image's header"]),
    'mask of another spacing': (lambda f: as_nifti(f, spacing=(.04, .02, .1)),
                                [A, 'spacing', '(0.01, 0.02)', 'resample']),
    'two classes of one colour': (lambda f: colours(f, 'background,0,0,0', 'IRF,255,0,0', 'SRF,255,0,0'),
                                  ['colours.csv', 'IRF and SRF have one colour']),
    'a colour of no class': (lambda f: colours(f, 'background,0,0,0', 'IRF,255,0,0'),
                             ['masks/v000_s00.png', '(0, 0, 255)', 'has no class']),
    'colours in hex': (lambda f: colours(f, 'background,#000000,,'), ['colours.csv', '#000000', '0 to 255']),
    'a colour of an unknown class': (lambda f: colours(f, 'background,0,0,0', 'edema,9,9,9'),
                                     ['edema', 'IRF, SRF, PED']),
    'colours, but masks of ids': (
        lambda f: (colours(f, 'background,0,0,0', 'IRF,255,0,0'), save(f/MASK, np.eye(32, 48, dtype=np.uint8))),
                                  [A, '(1, 1, 1)', 'has no class']),
    # classes
    'sixty-four classes': (lambda f: classes(f, '\n'.join(['background', *(f'c{i}' for i in range(63))])),
                           ['classes.txt', '64 names', '62 at most']),
    'classes on one line': (lambda f: classes(f, 'background,IRF,SRF,PED\n'), ['classes.txt', 'on a line of its own']),
    'classes with numbers': (lambda f: classes(f, '0 background\n1 IRF\n2 SRF\n3 PED\n'),
                             ['classes.txt', 'leave out the numbers']),
    'no class at all': (lambda f: classes(f, ''), ['classes', 'at least one class']),
    # splits and labels
    'splits in capitals': (lambda f: edit(f, lambda t: t.assign(split=t.split.str.capitalize())),
                           ["'Train'", 'train, valid, test']),
    'no split in any row': (lambda f: edit(f, lambda t: t.assign(split=None)),
                            ['split is blank for 10 images', 'remove']),
    'a finding that is 2': (lambda f: edit(f, lambda t: t.assign(IRF='2')),
                            ['labels.csv', "'IRF'", '2 is not a label']),
    'labels separated by commas': (lambda f: said_of(f, image_labels='IRF,SRF'), [A, "'IRF,SRF'", ';']),
    'a label in lower case': (lambda f: said_of(f, image_labels='irf'), [A, "'irf'", 'IRF, SRF, PED']),
    'a label as a number': (lambda f: said_of(f, image_labels='1'), [A, "'1'", 'IRF, SRF, PED']),
    'background as absent': (lambda f: said_of(f, absent_labels='background'), [A, 'background cannot be absent']),
    'background looked for': (lambda f: edit(f, put(looked_for='background')), [A, 'looked_for is background']),
    'a kind in capitals': (lambda f: edit(f, put(kind='Mask')), [A, "'Mask'", 'the kinds are mask']),
    # boxes, points, strokes
    'box with x and y exchanged': (lambda f: box(f, 'IRF', 2, 40, 5, 47),
                                   ['boxes.csv row 2', A, 'leaves the image of 48x32']),
    'box that begins before the image': (lambda f: box(f, 'IRF', -3, 2, 5, 7),
                                         ['boxes.csv row 2', A, 'leaves the image']),
    'infinite box': (lambda f: box(f, 'IRF', 1, 2, 'inf', 7), ['boxes.csv row 2', A, 'not a number']),
    'box beyond all numbers': (lambda f: box(f, 'IRF', 1, 2, '1e400', 7), ['boxes.csv row 2', A, 'not a number']),
    'box in per cent': (lambda f: box(f, 'IRF', '12%', 2, 5, 7), ['boxes.csv row 2', A, "'12%'", 'must be numbers']),
    'box with width and height': (lambda f: box(f, 'IRF', 30, 20, 10, 8), ['boxes.csv row 2', A, 'empty or inverted']),
    'box of class 1': (lambda f: box(f, '1', 1, 2, 5, 7), ['boxes.csv row 2', A, "'1'", 'IRF, SRF, PED']),
    'box of a class in lower case': (lambda f: box(f, 'irf', 1, 2, 5, 7),
                                     ['boxes.csv row 2', A, "'irf'", 'IRF, SRF, PED']),
    'empty boxes.csv': (lambda f: (box(f, 'IRF', 1, 2, 5, 7), (f/'boxes.csv').write_text('')), ['boxes.csv', 'empty']),
    'box in the slice of a flat image': (
        lambda f: table(f, 'boxes.csv', f'{BOX},slice', (A, 'IRF', 1, 2, 5, 7, 3), kind='boxes'),
                                         ['boxes.csv row 2', f'{A}/3', 'not in labels.csv']),
    'box in a volume without a slice': (
        lambda f: (as_volume(f), (f/f'masks/{A}.tif').unlink(), box(f, 'IRF', 1, 2, 5, 7)),
                                        ['boxes.csv row 2', f'{A} is a volume', 'column slice']),
    'point with NaN': (lambda f: point(f, 'IRF', '', 3), ['points.csv row 2', A, 'not a number']),
    'point before the image': (lambda f: point(f, 'IRF', -1, 3), ['points.csv row 2', A, 'leaves the image']),
    'point that is present as yes': (lambda f: points(f, ('IRF', 4, 5, 'yes')),
                                     ['points.csv row 2', "'yes'", 'write 1, or 0']),
    'stroke that leaves the image': (lambda f: strokes(f, (0, 'IRF', 3, 4), (0, 'IRF', 99, 4)),
                                     ['scribbles.csv row 3', A, 'leaves the image']),
    'strokes in colour': (lambda f: annotation(f, 'scribbles', np.zeros((32, 48, 3), np.uint8)),
                          [A, 'scribbles', '3 channels']),
    'strokes of an unknown class': (lambda f: annotation(f, 'scribbles', np.full((32, 48), 9, np.uint8)),
                                    [A, 'scribbles', '9..9', '0..3']),
    # maps and intervals
    'thresholds the wrong way round': (lambda f: maps(f, '.2,.8'), [A, 'core=0.2', 'rim=0.8', '0 <= rim <= core']),
    'thresholds in per cent': (lambda f: maps(f, '80,20'), ['thresholds.csv', 'IRF has 80', 'from 0 to 1']),
    'thresholds in words': (lambda f: maps(f, 'high,low'), ['thresholds.csv', 'IRF has high', 'from 0 to 1']),
    'probabilities of 7': (lambda f: maps(f, '.8,.2', np.full((32, 48), 7, np.float32)), [A, 'from 7 to 7', 'in 0..1']),
    'certain, but not possible': (lambda f: (annotation(f, 'certain', np.full((32, 48), 4, np.uint8)),
                                             annotation(f, 'possible', np.full((32, 48), 3, np.uint8))),
                                  [A, 'certain that is not possible', 'mend']),
    # exports of annotation tools
    'half an export': (lambda f: export(f, '{"images": ['), ['annotations/a.json', 'damaged JSON', 'export it again']),
    'an empty export': (lambda f: export(f, '{}'), ['annotations/a.json', 'none of the formats coco']),
    'a table among exports': (lambda f: export(f, f'{BOX}\n', 'boxes.csv'),
                              ['annotations/boxes.csv', 'none of the formats']),
    'a pickle among exports': (lambda f: export(f, pickle.dumps(Evil(f)), 'a.pkl'), ['annotations', 'holds no export']),
    'an export that is a bomb': (lambda f: export(f, laughs(), 'a.xml'), ['annotations/a.xml', 'DOCTYPE']),
    'an export that reads other files': (lambda f: export(
        f, '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotations>&e;</annotations>',
        'a.xml'), ['annotations/a.xml', 'DOCTYPE']),
    'an export of an unknown class': (lambda f: coco(f, 'edema'),
                                      [f'{A}.png, annotation 1', "'edema'", 'rename', 'classes.txt']),
    'an export of an image that is not there': (
        lambda f: (coco(f), (f/IMAGE).unlink(), edit(f, lambda t: t[t.id != A])),
                                                [f'annotations/a.json, {A}.png', 'not among', 'out of the export']),
    'an export of larger images': (lambda f: coco(f, width=96, height=64), [f'{A}.png', '(64, 96)', '(32, 48)']),
}

PAGE = ROOT/'nbs/howto/mistakes.ipynb'

def told(error, folder):
    "The first lines of an error as the page has them: without the place of the folder, and no longer than a line."
    first, *others = str(error).replace(f'{folder.parent}/', '').splitlines()
    if first.endswith(':'): first = next(filter(str.strip, others)) # of a list, or of a callback
    words = ' '.join(first.split())
    words = words if len(words) <= 250 else words[:249] + '…'
    return words.replace('|', r'\|').replace('<', r'\<').replace('*', r'\*').replace('$', r'\$')

def line(case, words): return f'| {case} | {words} |'

def assert_on_the_page(case, words):
    cells = nbformat.read(PAGE, 4).cells
    assert any(line(case, words) in c.source.splitlines() for c in cells), f'{PAGE.name} lacks it: python {__file__}'

class Evil:
    "Unpickled, it would leave a file."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder/'pwned'),)

def files_in(folder): return {p: p.lstat().st_mtime_ns for p in folder.rglob('*')}

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
    assert_on_the_page(case, told(e.value, folder))

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
def grey_of(cat): return np.asarray(oct_phantoms(5, 2, (32, 48), seed=1)['image'].iloc[6])
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
    'a big-endian image': (as_big_endian, lambda c: read_image(row(c).image).max() == 200*int(grey_of(c).max())),
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
    'blank lines in a table': (lambda f: text(f, lambda t: t.replace('\n', '\n\n')), lambda c: len(c) == 10),
    'a comma at the end of each row': (lambda f: text(f, lambda t: t.replace('\n', ',\n')), lambda c: len(c) == 10),
    'line ends of old Macs': (lambda f: edit_bytes(f, b'\n', b'\r'), lambda c: len(c) == 10),
    'classes in UTF-16': (lambda f: (f/'classes.txt').write_bytes('background\nÖdem\nSRF\nPED\n'.encode('utf-16')),
                          lambda c: c.task.classes[1] == 'Ödem'),
    'backslashes in ids': (lambda f: (in_sub_folders(f), name(f, 'p1\\1', 'p1/1')),
                           lambda c: row(c, 'p1/1').annotation.kind == 'mask'),
    'ids whose umlauts are taken apart': (lambda f: rename(f, 'Mu\u0308ller', 'M\u00fcller'),
                                          lambda c: row(c, 'M\u00fcller').annotation.kind == 'mask'),
    'an id like a number': (lambda f: rename(f, '1e5'), lambda c: row(c, '1e5').annotation.kind == 'mask'),
    'an image called None': (lambda f: rename(f, 'None'), lambda c: row(c, 'None').annotation.kind == 'mask'),
    'an id with dots': (lambda f: rename(f, 'a.b.c'), lambda c: row(c, 'a.b.c').annotation.kind == 'mask'),
    'an id with signs of patterns': (lambda f: rename(f, '[a]*?'), lambda c: row(c, '[a]*?').annotation.kind == 'mask'),
    'an id with a comma, in quotes': (lambda f: rename(f, 'a, \U0001f600'),
                                      lambda c: row(c, 'a, \U0001f600').annotation.kind == 'mask'),
    'hidden files of other systems': (lambda f: [(f/k/n).write_bytes(b'\0\1') for k in ('images', 'masks')
                                                 for n in ('.DS_Store', f'._{A}.png', 'Thumbs.db')],
                                      lambda c: len(c) == 10),
    'text beside the images': (lambda f: (f/'images/README.txt').write_text('mine'), lambda c: len(c) == 10),
    'a volume as NIfTI': (as_nifti, lambda c: row(c, f'{A}/2').annotation.kind == 'mask'),
    'blank slices at the ends of a volume': (
        lambda f: blank(f, 0, 2), lambda c: [i for i in c.id if A in i] == [f'{A}/1'] and (
            row(c, f'{A}/1').slice == 1 and c.index.tolist() == list(range(10)))),
    'a mask for a slice, listed or not': (
        lambda f: a_mask_each(f, 0, 2), lambda c: [row(c, f'{A}/{k}').annotation.kind for k in range(2)] == [
            'mask', 'unlabelled']),
    'an export that holds other images, too': (lambda f: (coco(f), edit(f, lambda t: t[t.id != A])),
                                               lambda c: len(c) == 9 and {a.kind for a in c.annotation} == {'mask'}),
    'a mask with a palette': (lambda f: palette(f), lambda c: same_mask(c)),
    'a mask of one bit': (lambda f: Image.fromarray(mask_of(f) > 0).save(f/MASK),
                          lambda c: set(row(c).annotation.read().unique().tolist()) <= {0, 1}),
    'a mask as GIF': (lambda f: (Image.fromarray(mask_of(f)).save(f/f'masks/{A}.gif'), (f/MASK).unlink()),
                      lambda c: same_mask(c)),
    'a mask that is unknown everywhere': (lambda f: save(f/MASK, np.full((32, 48), 255, np.uint8)),
                                          lambda c: not known(row(c).annotation).any()),
    'an image of 16 bits': (lambda f: save(f/IMAGE, np.arange(32*48, dtype=np.uint16).reshape(32, 48)*40),
                            lambda c: read_image(row(c).image).max() == (32*48-1)*40),
    'numbers below zero': (lambda f: image_as_tiff(f, np.arange(32*48, dtype=np.int16).reshape(32, 48) - 1000),
                           lambda c: read_image(row(c).image).min() == -1000),
    'grey as three colours': (lambda f: layers(f, 3), lambda c: read_image(row(c).image).shape == (32, 48)),
    'grey as three colours and opacity': (lambda f: layers(f, 4), lambda c: read_image(row(c).image).shape == (32, 48)),
    'grey and opacity': (lambda f: layers(f, 2), lambda c: read_image(row(c).image).shape == (32, 48)),
    'a box of the whole image': (lambda f: box(f, 'IRF', 0, 0, 48, 32),
                                 lambda c: row(c).annotation == Boxes([(1, 0, 0, 48, 32)])),
    'blanks around a class': (lambda f: box(f, ' IRF ', 1, 2, 5, 7),
                              lambda c: row(c).annotation == Boxes([(1, 1, 2, 5, 7)])),
    'a box twice': (lambda f: table(f, 'boxes.csv', BOX, *[(A, 'IRF', 1, 2, 5, 7)]*2, kind='boxes'),
                    lambda c: row(c).annotation.class_sets((32, 48), 4)[1, 4, 3] == 0b11),
    'kind tight boxes': (lambda f: table(f, 'boxes.csv', BOX, (A, 'IRF', 1, 2, 5, 7), kind='tight boxes'),
                         lambda c: row(c).annotation == Boxes([(1, 1, 2, 5, 7)], tight=True)),
    'kind boxes, and no box': (lambda f: table(f, 'boxes.csv', BOX, kind='boxes'),
                               lambda c: known(row(c).annotation).all()),
    'a thousand boxes': (lambda f: table(f, 'boxes.csv', BOX, *((A, 'IRF', i % 40, i % 30, i % 40 + 1, i % 30 + 1)
                                                                for i in range(1000)), kind='boxes'),
                         lambda c: row(c).annotation.class_sets((32, 48), 4)[1].max() == 0b11),
    'a point twice': (lambda f: points(f, *[('IRF', 4, 5, 1)]*2),
                      lambda c: row(c).annotation.class_sets((32, 48), 4)[:2, 5, 4].tolist() == [2, 2]),
    'two classes at one point': (lambda f: points(f, ('IRF', 4, 5, 1), ('SRF', 4, 5, 1)),
                                 lambda c: row(c).annotation.class_sets((32, 48), 4)[:2, 5, 4].tolist() == [0, 0b110]),
    'a stroke of one point': (lambda f: strokes(f, (0, 'IRF', 3, 4)),
                              lambda c: row(c).annotation.class_sets((32, 48), 4)[0, 4, 3] == 2),
    'a label twice, and a last semicolon': (lambda f: said_of(f, image_labels='IRF;IRF;'),
                                            lambda c: set(row(c).annotation.classes) == {1}),
    'sixty-two classes': (lambda f: classes(f, '\n'.join(['background', *(f'c{i}' for i in range(61))])),
                          lambda c: c.task.n_classes == 62),
    'a patient called NA': (lambda f: edit(f, put(group='NA')), lambda c: row(c).group == 'NA'),
    'names of several words as labels': (
        lambda f: (classes(f, 'background\nLung Opacity\nSRF\nPED\n'), said_of(f, image_labels='Lung Opacity')),
        lambda c: row(c).annotation.classes == [1]),
    'blanks and marks in classes.txt': (lambda f: classes(f, '\ufeffbackground \nIRF  \nSRF\nPED\n\n'),
                                        lambda c: c.task.classes == ('background', 'IRF', 'SRF', 'PED')),
    'an id with leading zeros': (lambda f: rename(f, '007'), lambda c: row(c, '007').annotation.kind == 'mask'),
    'an image of 7 x 9': (lambda f: [save(f/x, np.resize(np.array(Image.open(f/x)), (7, 9))) for x in (IMAGE, MASK)],
                          lambda c: image_size(row(c).image) == (7, 9)),
    'background of another name': (lambda f: classes(f, 'Hintergrund\nIRF\nSRF\nPED\n'),
                                   lambda c: c.task.classes[0] == 'Hintergrund'),
}

MEANT = {
    'a volume of three pages': 'three images, ID/0 to ID/2',
    'masks in colours': 'the classes of colours.csv',
    'a file for each class': 'masks in which classes may overlap',
    'no file of any class': 'unlabelled',
    'no file, but looked for': 'a mask that shows nothing, if the kind is mask',
    'a big-endian image': 'its numbers',
    'unknown pixels': '255 in a mask: every class is possible there',
    'masks of 0 and 255': 'background and the other class',
    'masks of 0 and 255, no list': 'background and foreground',
    'UTF-16': 'the text', 'latin-1': 'the text, and the report says to look at accents',
    'UTF-8 with a mark': 'the text',
    'semicolons': 'the same table', 'tabs': 'the same table', 'classes in latin-1': 'the names',
    'capital suffixes': 'the same files', 'a JPEG image': 'the image, beside others in PNG', 'a BMP image': 'the image',
    'ids with suffix': 'the same images', 'ids in sub-folders': 'folder/ID', 'relative boxes': 'multiplied by the size',
    'decimal commas': 'decimals, where cells are separated by semicolons',
    'tight and loose': 'each box by its own column', 'a point that denies': 'this class is not at the pixel',
    'absent labels': 'what is neither present nor absent is open',
    'part of the classes': 'the others are possible everywhere',
    'boxes of part of the classes': 'the others are possible everywhere',
    'two kinds, one named': 'the one that is named',
    'boxes and points': 'both', 'boxes and a label that follows': 'both', 'a partial mask and points': 'both',
    'a link to a folder of images elsewhere': 'the images there: the folder itself may be a link',
    'images that are not listed': 'left out, and the report says how many',
    'folders with blanks and apostrophes': 'the folder',
    'blank lines in a table': 'passed over', 'a comma at the end of each row': 'passed over',
    'line ends of old Macs': 'the same table', 'classes in UTF-16': 'the names', 'backslashes in ids': 'folder/ID',
    'ids whose umlauts are taken apart': 'the same name', 'an id like a number': 'text', 'an image called None': 'text',
    'an id with dots': 'text', 'an id with signs of patterns': 'text', 'an id with a comma, in quotes': 'text',
    'hidden files of other systems': 'passed over', 'text beside the images': 'passed over',
    'a volume as NIfTI': 'its slices, ID/0 and so on',
    'blank slices at the ends of a volume': 'left out, with a note that says how many; they keep their numbers',
    'a mask for a slice, listed or not': 'the mask of ID/0 is masks/ID/0; of a slice that is not listed, left out',
    'an export that holds other images, too': 'what is said of images that are not listed is passed over',
    'a mask with a palette': 'the numbers, not the colours',
    'a mask of one bit': 'ids 0 and 1', 'a mask as GIF': 'its ids',
    'a mask that is unknown everywhere': 'nothing is known',
    'an image of 16 bits': 'its numbers; the report says that the range is another',
    'numbers below zero': 'its numbers',
    'grey as three colours': 'grey', 'grey as three colours and opacity': 'grey', 'grey and opacity': 'grey',
    'a box of the whole image': 'a box', 'blanks around a class': 'the class', 'a box twice': 'one box',
    'kind tight boxes': 'tight, where boxes.csv says nothing',
    'kind boxes, and no box': 'nothing is there', 'a thousand boxes': 'a thousand boxes', 'a point twice': 'one point',
    'two classes at one point': 'one of both', 'a stroke of one point': 'a point',
    'a label twice, and a last semicolon': 'one label', 'sixty-two classes': 'sixty-two classes',
    'a patient called NA': 'text', 'names of several words as labels': 'the names',
    'blanks and marks in classes.txt': 'the names', 'an id with leading zeros': 'text',
    'an image of 7 x 9': 'the image',
    'background of another name': 'the first class, with a warning'}

def palette(folder):
    "The mask as numbers of a palette."
    image = Image.fromarray(mask_of(folder)).convert('P')
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(folder/MASK)
def layers(folder, n):
    grey = np.array(Image.open(folder/IMAGE))
    save(folder/IMAGE, np.dstack([grey]*(n - (n % 2 == 0)) + [np.full_like(grey, 255)]*(n % 2 == 0)))
def same_mask(cat):
    "Whether the mask is that of the sound folder."
    return np.array_equal(row(cat).annotation.read(), oct_phantoms(5, 2, (32, 48), seed=1)['mask'].iloc[6])

@pytest.mark.parametrize('case', HANDLED)
def test_handled(folder, case):
    change, right = HANDLED[case]
    change(folder)
    if 'apostrophes' in case: folder = folder.rename(folder.parent/"my patients' eyes")
    before = files_in(folder.parent)
    assert right(read_folder(folder)) and files_in(folder.parent) == before
    assert check_folder(folder).problems == []
    assert_on_the_page(case, MEANT[case])

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
    certain, possible = (set(sets[:, k].unique().tolist()) for k in (0, 1))
    assert certain <= {0, 2, 4, 8} and {0b1101, 0b1011, 0b0111} <= possible

def test_a_volume_becomes_a_batch(folder):
    as_volume(folder)
    assert start(folder).one_batch()[0].shape == (8, 1, 32, 48)

def test_blank_slices_are_told_and_left_out_of_several_folders_alike(folder, tmp_path):
    "One line for each volume, by the report and before a training; boxes name the volume's own slices."
    other = shutil.copytree(folder, tmp_path/'other')
    blank(folder, 0)
    words = f"{folder/f'images/{A}.nii.gz'}: 1 of 3 slices left out, as they hold one value only"
    report = check_data([folder, other])
    assert report.problems == [] and report.notes.count(words) == 1 and len(report.images) == 21
    with pytest.warns(UserWarning, match=re.escape(words)): cat = read_data([folder, other])
    assert [i for i in cat.id if f'eyes/{A}' in i] == [f'eyes/{A}/1', f'eyes/{A}/2'] and len(cat) == 21
    (folder/f'masks/{A}.nii.gz').unlink()
    (folder/'boxes.csv').write_text(f'{BOX},slice\n{A},IRF,1,2,5,7,2\n')
    assert row(read_folder(folder), f'{A}/2').annotation == Boxes([(1, 1, 2, 5, 7)])
    (folder/'boxes.csv').write_text(f'{BOX},slice\n{A},IRF,1,2,5,7,0\n')
    with pytest.raises(ValueError, match='marks a structure, but image .*slice 0, is constant'): read_folder(folder)

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

def test_a_byte_order_mark_and_blanks_in_a_table(folder):
    file = folder/'labels.csv'
    text = file.read_text().replace('id,group,', 'id , group ,', 1).replace('train', ' train ')
    file.write_bytes(('\ufeff' + text).encode())
    assert read_folder(folder).split.value_counts().to_dict() == {'train': 6, 'valid': 2, 'test': 2}

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
    with pytest.raises((ValueError, OSError), match=words) as e: do(folder)
    assert not (folder/'pwned').exists()
    assert_on_the_page(case, told(e.value, folder))

def test_a_loss_that_is_lost_is_named(folder):
    learn = learner(folder)
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with pytest.warns(UserWarning, match='the loss is no number any more'): fit(learn, epochs=1, bar=False)


BUDGETS = {
    'more masks than images': (dict(masks=99), ['99', 'training has 6', "'all'"]),
    'half an image': (dict(masks=1.5), ['1.5']),
    'a budget of no mask': (dict(masks=0), ['masks=0', '1..6']),
    'larger pool than there is': (dict(pool=99), ['pool=99', 'training has 6']),
    'a budget of an unknown kind': (dict(masks=1, kind='box'), ["'box'", 'boxes']),
    'a budget in an unknown order': (dict(masks=1, by='patients'), ["'patients'", 'groups']),
}

@pytest.mark.parametrize('case', BUDGETS)
def test_budget(folder, case):
    given, words = BUDGETS[case]
    with pytest.raises(ValueError) as e: simulate_budget(read_folder(folder), **given)
    for word in words: assert word in str(e.value)
    assert_on_the_page(case, told(e.value, folder))

@pytest.mark.parametrize('valid, test, words', [
    (0, .2, "'valid' is empty"), (.6, .6, '5 groups cannot be split.*smaller shares')])
def test_shares(folder, valid, test, words):
    with pytest.raises(ValueError, match=words): make_dataloaders(split_groups(read_folder(folder), valid, test))

def test_classes_that_the_masks_do_not_have(folder):
    with pytest.raises(ValueError, match='2 classes.*0..1'): read_folder(folder, ['background', 'IRF'])

def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match='/no/such/folder/labels.csv does not exist'):
        read_folder('/no/such/folder')


# the page that shows all of it

ELSEWHERE = {
    'half a file, in each format': ('cannot be read, data cut off', 'test_files.py::test_broken_files'),
    'text, or nothing, in each format': ('cannot be read', 'test_files.py::test_broken_files'),
    'headers that promise too much: PNG, TIFF, NRRD, NIfTI': (
        'too large to be true', 'test_files.py::test_broken_files'),
    'bombs in TIFF and NRRD': ('more data than its header, too large to be true', 'test_files.py::test_broken_files'),
    'several volumes in a NIfTI': ('save each as a file of its own', 'test_files.py::test_broken_files'),
    'an MHD without its data, or with half of them': ('missing, cut off', 'test_files.py::test_broken_files'),
    'masks of soft edges, decimals, colours, as JPEG, also called PNG or in TIFF': (
        'what to save instead', 'test_files.py::test_masks_that_are_none'),
    'a photograph on its side': ('save it upright', 'test_files.py::test_a_photograph_on_its_side_is_refused'),
    'constant or NaN, in five formats': ('remove it', 'test_files.py::test_constant_and_nan_images'),
    'volumes without SimpleITK': ('the command that installs it', 'test_files.py::test_without_simpleitk'),
    'names that lead out of a folder, by links or dots': (
        'copy the file into the folder', 'test_files.py::test_never_out_of_the_folder'),
    'boxes of no width, in shares, twice over': (
        'empty or inverted, multiply x', 'test_annotations.py::test_shares_are_no_pixels'),
    'more boxes than a region has bits': ('read as meant', 'test_annotations.py::test_more_boxes_than_region_bits'),
    'two annotations that contradict each other': (
        'both are named', 'test_annotations.py::test_contradictions_are_refused'),
    'an export cut off anywhere': ('named', 'test_tools.py::test_a_file_cut_off_is_an_error'),
    'a folder that is no data set, or several': ('what tells them', 'test_sources.py::test_folders_that_are_not_known'),
    'CheXpert without one of its parts': (
        'unpack all parts', 'test_sources.py::test_chexpert_without_one_of_its_parts'),
    'a data set that cannot be written to': (
        'another place', 'test_sources.py::test_a_data_set_that_cannot_be_written_to'),
    'problems by the dozen': ('the first seven, and how many more', 'test_bad_input.py::test_a_long_list_is_cut'),
    'a kind without its data': ('what it needs', 'test_bad_input.py::test_a_kind_without_its_data'),
    'no training image with a mask': ('refused by the library; the command says that scores count what is known',
                                      'test_bad_input.py::test_no_training_mask'),
    'validation images without a mask': ('named', 'test_bad_input.py::test_nothing_to_validate_on'),
    'images of several sizes, and no size': (
        'give a size', 'test_bad_input.py::test_images_of_several_sizes_without_a_size'),
    'a table without a task': ('make a catalogue of it', 'test_bad_input.py::test_a_table_without_a_task'),
    'copies of an image in two groups': (
        'the report names both', 'test_bad_input.py::test_a_copy_in_another_group_is_noted'),
    'a loss that becomes NaN': ('a warning at once', 'test_bad_input.py::test_a_loss_that_is_lost_is_named'),
    'model files that are cut, foreign or of a later version': ('named', 'test_models.py::test_wrong_files_are_named'),
    'scores of images of which nothing is known': (
        'named, never zero', 'test_models.py::test_only_what_is_known_counts'),
    'a prediction into the folder of the images': (
        'choose another folder', 'test_predict.py::test_no_image_and_no_drawn_mask_is_replaced'),
    'a prediction over a mask that was corrected': (
        'is not replaced', 'test_predict.py::test_a_corrected_mask_is_not_replaced'),
    'networks of different tasks': ('named', 'test_predict.py::test_networks_that_disagree'),
    'grey values far from those of the training': (
        'a warning', 'test_predict.py::test_grey_values_far_from_those_of_the_training'),
    'classes with names of files in them': ('one folder each', 'test_predict.py::test_maps_of_classes_with_any_name'),
    'a patient in a DICOM header': (
        'never leaves it', 'test_predict.py::test_nothing_of_a_patient_leaves_the_scanner_file'),
    'a full disk': ('says so; what was complete stays', 'test_runs.py::test_full_disk'),
    'a kill in the middle of a training': ('the same command goes on', 'test_cli.py::test_a_stopped_and_killed_training_goes_on'),
    'a kill in the middle of a file': (
        'the earlier file stays', 'test_runs.py::test_killed_while_writing_keeps_the_earlier_file'),
    'two trainings of one run': ('the second says so', 'test_runs.py::test_one_of_two_that_start_together_wins'),
    'commands, options and values that are typed wrongly': (
        'one line, with what was meant', 'test_cli.py::test_what_is_typed_wrongly'),
    'packages that are missing': ('the command that installs them', 'test_cli.py::test_a_missing_extra_is_named'),
    'places that cannot be written to': ('choose another folder', 'test_cli.py::test_what_is_typed_wrongly'),
    'folders with blanks and apostrophes, for make': (
        'read as meant', 'test_experiments.py::test_a_long_series_is_done_in_order_and_goes_on'),
    'runs where nothing can be written': (
        'another folder with RUNS=', 'test_experiments.py::test_runs_where_nothing_can_be_written'),
    'labels of explanations that were damaged': ('delete which files', 'test_store.py::test_other_damage_is_noticed'),
}

def test_each_kind_elsewhere_has_its_test():
    for words, test in ELSEWHERE.values():
        file, function = test.split('::')
        assert f'def {function}(' in (ROOT/'tests'/file).read_text(), test

def test_the_page_counts_and_repeats_nothing():
    kinds = [*FILES, *HANDLED, *TYPED, *BUDGETS, *ELSEWHERE]
    assert len(set(kinds)) == len(kinds) and set(MEANT) == set(HANDLED)
    assert page_cells({}, {})[0] == nbformat.read(PAGE, 4).cells[0].source
    lines = [l for c in nbformat.read(PAGE, 4).cells for l in c.source.splitlines() if l.startswith('| ')]
    assert len(lines) == len(kinds) + 4 # heads of tables
    assert_on_the_page('half a file, in each format', ' | '.join(ELSEWHERE['half a file, in each format']))

def markdown(columns, rows): return '\n'.join([line(*columns), '|---'*(1 + columns[1].count('|') + 1) + '|', *rows])

def page_cells(said, typed):
    "The prose of the page, with what is said of each kind."
    n = len(FILES) + len(TYPED) + len(BUDGETS)
    return [f"""# Broken input

> What happens if a file, a table or a number is wrong?

Nothing is trained. All that a folder holds is opened before the first step, and all problems are told at once, with \
file, row and remedy. Below is each kind of mistake that is tested: {n} that are refused, with the words that one \
reads, {len(HANDLED)} that are none and are read as they were meant, and {len(ELSEWHERE)} whose tests stand elsewhere. \
`tests/test_bad_input.py` breaks a folder of phantoms in each of these ways and holds this page to what is said; \
nothing outside of an output folder is ever written.""",
            '## What is refused\n\n' + markdown(('folder', 'what is said'), said.values()),
            '## What is read as it was meant\n\n' + markdown(('folder', 'read as'), map(line, HANDLED, MEANT.values())),
            '## What is refused in Python\n\n' + markdown(('argument', 'what is said'), typed.values()),
            '## And the rest\n\n' + markdown(('what', 'what happens | tested by'),
                                             [line(k, ' | '.join(v)) for k, v in ELSEWHERE.items()])]

def broken_copy(sound, spoil, use):
    "What is said of a copy of the folder."
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(sound, Path(root)/'eyes')
        try: spoil(folder), use(folder)
        except (ValueError, OSError) as e: return told(e, folder)

def write_page():
    with tempfile.TemporaryDirectory() as root:
        sound = save_phantoms(Path(root)/'eyes', 5, 2, (32, 48), seed=1)
        edit(sound, lambda t: t.assign(split=t.group.map(SPLIT)))
        said = {k: line(k, broken_copy(sound, spoil, start)) for k, (spoil, _) in FILES.items()}
        typed = {k: line(k, broken_copy(sound, lambda f: None, do)) for k, (do, _) in TYPED.items()}
        for k, (given, _) in BUDGETS.items():
            typed[k] = line(k, broken_copy(sound, lambda f: None, lambda f: simulate_budget(read_folder(f), **given)))
    page = nbformat.read(PAGE, 4)
    prose = [c for c in page.cells if c.cell_type == 'markdown' and not c.source.startswith('## All at once')]
    for cell, source in zip(prose, page_cells(said, typed), strict=True): cell.source = source
    nbformat.write(page, PAGE)


if __name__ == '__main__': write_page()
