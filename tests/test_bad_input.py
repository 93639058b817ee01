"""Bad folders as a user meets them: one error before any training, which names file and row, and the remedy.

A case breaks a small dataset folder and lists the words that the error must hold."""
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mlds.annotations import Boxes, Unlabelled
from mlds.catalogue import Catalogue, check_catalogue, simulate_budget, split_groups, task_of
from mlds.folders import read_folder
from mlds.dataloaders import make_dataloaders
from mlds.phantoms.oct import save_phantoms
from mlds.task import Task

torch.set_num_threads(1)
A = 'v003_s00'  # an image of a training group, and of no other split
IMAGE, MASK = f'images/{A}.png', f'masks/{A}.png'
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
    if classes: (folder/'classes.txt').write_text('background\nfluid\n')
    else: (folder/'classes.txt').unlink()
def box(folder, *values, id=A):
    edit(folder, put(kind='boxes'))
    (folder/'boxes.csv').write_text('id,class,x0,y0,x1,y1\n' + ','.join(map(str, (id, *values))) + '\n')


def test_the_sound_folder_reaches_training(folder):
    assert start(folder).one_batch()[0].shape == (8, 1, 32, 48)
    box(folder, 'IRF', 1, 2, 3, 4)
    assert read_folder(folder).annotation[6] == Boxes([[1, 1, 2, 3, 4]])


FILES = {
    'missing image': (lambda f: (f/IMAGE).unlink(), [A, IMAGE, 'does not exist']),
    'missing mask': (lambda f: (edit(f, put(kind='mask')), (f/MASK).unlink()), [A, MASK, 'does not exist']),
    'truncated image': (lambda f: cut(f/IMAGE), [A, IMAGE, 'cannot be read', 'replace']),
    'truncated mask': (lambda f: cut(f/MASK), [A, MASK, 'cannot be read', 'replace']),
    'no image at all': (lambda f: (f/IMAGE).write_text('see mail'), [A, IMAGE, 'cannot be read']),
    'mask in colour': (lambda f: save(f/MASK, np.zeros((32, 48, 3), np.uint8)),
                       [A, MASK, '3 channels', 'one 8-bit channel']),
    'mask of another size': (lambda f: save(f/MASK, np.zeros((30, 48), np.uint8)),
                             [A, '(30, 48)', '(32, 48)', 'agree']),
    'class id outside the list': (lambda f: save(f/MASK, np.full((32, 48), 9, np.uint8)),
                                  [A, '9', '4 classes', '0..3']),
    'masks of 0 and 255': (lambda f: whiten(f, True), ['255', '2 classes', '0..1', 'divide']),
    'masks of 0 and 255, no list': (lambda f: whiten(f, False), ['255', 'classes.txt']),
    'NaN image': (lambda f: nan_image(f/IMAGE), [A, IMAGE, 'NaN', 'remove']),
    'constant image': (lambda f: save(f/IMAGE, np.full((32, 48), 7, np.uint8)), [A, IMAGE, 'constant', 'remove']),
    'no labels.csv': (lambda f: (f/'labels.csv').unlink(), ['labels.csv', 'does not exist', 'id, group']),
    'empty labels.csv': (lambda f: (f/'labels.csv').write_text(''), ['labels.csv']),
    'no column id': (lambda f: edit(f, lambda t: t.drop(columns='id')), ['labels.csv', 'lacks', 'id']),
    'id twice': (lambda f: edit(f, lambda t: pd.concat([t, t[t.id == A]])), ['labels.csv', A, 'twice']),
    'blank id': (lambda f: edit(f, lambda t: t.assign(id=t.id.where(t.id != A))), ['labels.csv', 'id']),
    'blank group': (lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A))), [A, 'group']),
    'blank group, no splits': (
        lambda f: edit(f, lambda t: t.assign(group=t.group.where(t.id != A)).drop(columns='split')), [A, 'group']),
    'unknown kind': (lambda f: edit(f, put(kind='bbox')), [A, 'bbox', 'the kinds are', 'boxes']),
    'unknown image label': (lambda f: edit(f, put(kind='image labels', image_labels='IRF;edema')),
                            [A, 'edema', 'IRF, SRF, PED']),
    'masks gone': (lambda f: shutil.rmtree(f/'masks'), ['mask', 'v00']),
    'no foreground': (lambda f: [save(m, np.zeros((32, 48), np.uint8)) for m in (f/'masks').iterdir()],
                      ['positive_only', 'foreground']),
    'a class twice': (lambda f: (f/'classes.txt').write_text('background\nIRF\nIRF\nPED\n'), ['classes.txt', 'IRF']),
    'a blank class': (lambda f: (f/'classes.txt').write_text('background\nIRF\n\nPED\n'), ['classes.txt']),
    'background last': (lambda f: (f/'classes.txt').write_text('IRF\nSRF\nPED\nbackground\n'), ['background', 'first']),
    'classes in latin-1': (lambda f: (f/'classes.txt').write_bytes('background\nÖdem\n'.encode('latin-1')),
                           ['classes.txt', 'UTF-8']),
    'labels in UTF-16': (lambda f: (f/'labels.csv').write_bytes((f/'labels.csv').read_text().encode('utf-16')),
                         ['labels.csv', 'UTF-8']),
    'labels in latin-1': (lambda f: edit_bytes(f, A.encode(), b'\xe4'), ['labels.csv', 'UTF-8']),
    'semicolons': (lambda f: edit_bytes(f, b',', b';'), ['labels.csv', "';'", 'commas']),
    'tabs': (lambda f: edit_bytes(f, b',', b'\t'), ['labels.csv', "'\\t'", 'commas']),
    'image in another format': (lambda f: (f/IMAGE).rename(f/'images'/f'{A}.jpg'),
                                [A, f'{A}.jpg', 'convert it to .png']),
    'image of several pages': (lambda f: pages(f/IMAGE), [A, '2 pages', 'file of its own']),
    'image in colour': (lambda f: save(f/IMAGE, np.random.randint(0, 255, (32, 48, 3), np.uint8)),
                        [A, 'colour', 'channels=3']),
    'mask of decimals': (lambda f: save(f/MASK, np.zeros((32, 48), np.float32), format='TIFF'), [A, 'whole numbers']),
    'mask as JPEG': (lambda f: save(f/MASK, np.zeros((32, 48), np.uint8), format='JPEG'), [A, 'JPEG', 'PNG']),
    'box in shares': (lambda f: box(f, 'IRF', .1, .2, .3, .4), [A, '0..1', 'multiply x']),
    'box of width 0': (lambda f: box(f, 'IRF', 3, 2, 3, 4), [A, 'empty', 'x0 < x1']),
    'labels separated by blanks': (lambda f: edit(f, put(kind='image labels', image_labels='IRF SRF')),
                                   [A, "'IRF SRF'", ';']),
    'background alone': (lambda f: (f/'classes.txt').write_text('background\n'), ['class']),
    'box outside': (lambda f: box(f, 'IRF', 1, 2, 300, 4), [A, '300', 'leaves the image of 48x32']),
    'box inverted': (lambda f: box(f, 'IRF', 9, 2, 3, 4), [A, 'inverted', 'x0 < x1']),
    'box with NaN': (lambda f: box(f, 'IRF', 1, 2, '', 4), [A, 'not a number']),
    'box with text': (lambda f: box(f, 'IRF', 'a', 2, 3, 4), [A, "'a'", 'number']),
    'box of an unknown class': (lambda f: box(f, 'drusen', 1, 2, 3, 4), ['boxes.csv row 2', 'drusen', 'IRF, SRF, PED']),
    'box of the background': (lambda f: box(f, 'background', 1, 2, 3, 4), [A, 'foreground classes are 1..3']),
    'box of no image': (lambda f: box(f, 'IRF', 1, 2, 3, 4, id='v9_s9'), ['boxes.csv', 'v9_s9']),
    'no validation': (lambda f: edit(f, move('valid', 'train')), ["'valid' is empty", 'group']),
    'no training': (lambda f: edit(f, move('train', 'test')), ["'train' is empty", 'group']),
    'unknown split': (lambda f: edit(f, move('valid', 'val')), ['val', 'train, valid, test']),
    'group on both sides': (lambda f: edit(f, put(split='valid')), ['group v003', 'both sides', 'one side']),
    'one patient': (lambda f: edit(f, lambda t: t.assign(group='p').drop(columns='split')),
                    ['1 group', 'cannot be split into train, 1 valid and 1 test']),
}

@pytest.mark.parametrize('case', FILES)
def test_folder(folder, case):
    spoil, words = FILES[case]
    spoil(folder)
    with pytest.raises((ValueError, OSError)) as e: start(folder)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'

def test_all_problems_at_once(folder):
    "Whoever makes one mistake often makes it everywhere; the first twenty are spelt out."
    for file in (folder/'images').iterdir(): cut(file)
    for file in (folder/'masks').iterdir(): file.unlink()
    edit(folder, lambda t: t.assign(kind='mask', split='val').assign(group=t.group.where(t.id != A)))
    with pytest.raises(ValueError) as e: read_folder(folder)
    lines = str(e.value).splitlines()
    assert lines[0] == '14 problems:' and len(lines) == 15
    assert sum('cannot be read' in l for l in lines) == 10
    assert sum("'train' is empty" in l or "'valid' is empty" in l or "['val'] is unknown" in l for l in lines) == 3
    assert f'row 8 ({A}): group is blank' in lines[1]

def test_a_long_list_is_cut(folder):
    edit(folder, lambda t: pd.concat([t]*4).assign(id=[f'x{i}' for i in range(40)]))
    with pytest.raises(ValueError) as e: read_folder(folder)
    lines = str(e.value).splitlines()
    assert lines[0] == '40 problems:' and len(lines) == 22 and lines[-1] == '... and 20 more'


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
