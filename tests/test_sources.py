"""Public data sets in their official layouts, from the unpacked download to a training step.

Each layout is imitated with small noise images under the names, and with the quirks, of the real files; JSRT's raw files
and masks have their real size, as the reader insists on it."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mlds.catalogue import Catalogue, check_catalogue
from mlds.dataloaders import make_dataloaders
from mlds.files import read_image
from mlds.labels import learnable
from mlds.learner import fit, make_learner
from mlds.phantoms.chest import OBSERVATIONS
from mlds.sources.chest import read_source
from mlds.task import Task
from real_images import DATA, duke_as_mat, jsrt_as_raw, save_jsrt

torch.set_num_threads(1)


@pytest.fixture
def rng(): return np.random.default_rng(0)

def noise(rng, *size): return rng.integers(0, 256, size, dtype=np.uint8)

def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)

def train(cat, size=(32, 32)):
    "One iteration with validation, as a user would start it; the loss and the scores."
    check_catalogue(cat)
    assert set(cat.split) == {'train', 'valid', 'test'} and cat.groupby('group').split.nunique().max() == 1
    if cat.task.unit == 'image':
        classes = learnable(cat[cat.split == 'train'], cat.task.classes)
        cat = Catalogue(cat, Task(tuple(classes), unit='image'))
    dls = make_dataloaders(cat, bs=4, size=size, iterations=1, seed=0, device='cpu')
    network = dict(encoder='test_resnet') if cat.task.unit == 'image' else dict(width=4, head_width=4)
    curve = fit(make_learner(dls, network=network), epochs=1, bar=False)
    losses = curve[['train_loss', 'valid_loss']].to_numpy(float)
    assert len(curve) == 1 and np.isfinite(losses).all()
    return cat


# RETOUCH

def save_mhd(path, volume):
    path.parent.mkdir(parents=True, exist_ok=True)
    volume.tofile(path.with_suffix('.raw'))
    kind = {'uint8': 'MET_UCHAR', 'uint16': 'MET_USHORT'}[str(volume.dtype)]
    lines = ['ObjectType = Image', 'NDims = 3', 'BinaryData = True', 'BinaryDataByteOrderMSB = False',
             'CompressedData = False', 'ElementSpacing = 0.0117 0.00195 0.0469',
             f"DimSize = {' '.join(map(str, volume.shape[::-1]))}", f'ElementType = {kind}',
             f'ElementDataFile = {path.stem}.raw']
    path.write_text('\n'.join(lines) + '\n')

def retouch(folder, rng):
    sizes = {'Cirrus': (3, 40, 20, 1), 'Spectralis': (2, 20, 20, 25), 'Topcon': (3, 35, 20, 49)}
    for scanner, (scans, h, w, first) in sizes.items():
        for k in range(first, first+2):
            case = folder/f'RETOUCH-TrainingSet-{scanner}/TRAIN{k:03d}'
            oct = noise(rng, scans, h, w)
            save_mhd(case/'oct.mhd', oct.astype(np.uint16)*257 if scanner == 'Spectralis' else oct)
            save_mhd(case/'reference.mhd', (oct > 128).astype(np.uint8) * rng.integers(0, 4, oct.shape, np.uint8))
        save_mhd(folder/f'RETOUCH-TestSet-{scanner}/TEST{k:03d}/oct.mhd', oct)

def test_retouch(tmp_path, rng):
    retouch(tmp_path, rng)
    cat = train(read_source(tmp_path))
    assert len(cat) == 2*(3 + 2 + 3) and cat.task.classes == ('background', 'IRF', 'SRF', 'PED')
    assert not any(g.split('_')[1].startswith('TEST') for g in cat.group)
    more = read_source(tmp_path, unlabelled=True)
    extra = more[[a.kind == 'unlabelled' for a in more.annotation]]
    assert len(extra) == 3 + 2 + 3 and set(extra.split) == {'train'}


# Duke DME

def duke(folder, rng, subjects=5, scans=6):
    folder.mkdir(parents=True)
    for k in range(1, subjects+1):
        images, graded = noise(rng, 31, 48, scans), [k % 2, k % 2 + 2]
        images[:6] = 255   # what registration moved in
        fluid = np.full(images.shape, np.nan)
        layers = np.full((8, 48, scans), np.nan)
        fluid[..., graded], layers[:, 5:40, graded] = 0, 9.
        fluid[8:12, 10:20, graded[0]], fluid[20:24, 30:36, graded[0]] = 1, 13
        arrays = dict(manualFluid1=fluid, manualFluid2=fluid, manualLayers1=layers, manualLayers2=layers)
        automatic = dict(automaticFluidDME=np.ones(images.shape), automaticLayersDME=layers)
        savemat(folder/f'Subject_{k:02d}.mat', dict(images=images) | arrays | automatic, do_compression=True)

def test_duke(tmp_path, rng):
    duke(tmp_path/'2015_BOE_Chiu', rng)
    cat = train(read_source(tmp_path))
    assert len(cat) == 10 and cat.group.nunique() == 5 and cat.scan.tolist() == [1, 3, 0, 2, 1, 3, 0, 2, 1, 3]
    assert [a.read().sum().item() for a in cat.annotation] == [40 + 24, 0]*5
    assert read_image(cat.image[0])[:6].max() == 0 and read_image(cat.image[0])[6:].max() > 200


# CheXpert

def chexpert_table(paths, rng, columns=(), names=OBSERVATIONS):
    values = rng.choice(['1.0', '0.0', '-1.0', ''], (len(paths), len(names)))
    for row, path in enumerate(paths):   # the first ones show both sides of an observation
        if row < 4: values[row, 3:6] = ['1.0', '0.0'][row % 2]
    table = pd.DataFrame(values, columns=names)
    about = {'Sex': 'Female', 'Age': 68, 'Frontal/Lateral': 'Frontal', 'AP/PA': 'AP'}
    for k, c in enumerate(columns): table.insert(k, c, about[c])
    table.insert(0, 'Path', paths)
    return table

def chexpert_patients(first, n, split):
    return [f'{split}/patient{first+k:05d}/study1/view1_frontal.jpg' for k in range(n)]

ABOUT = ['Sex', 'Age', 'Frontal/Lateral', 'AP/PA']

def chexpert_small(root, rng, name='CheXpert-v1.0-small', sets=('train', 'valid')):
    for split, first, n in (('train', 1, 20), ('valid', 64541, 4)):
        if split not in sets: continue
        paths = chexpert_patients(first, n, split)
        for p in paths: save(noise(rng, 39, 32), root/name/p)
        table = chexpert_table([f'{name}/{p}' for p in paths], rng, ABOUT)
        table.to_csv(root/name/f'{split}.csv', index=False)

def chexpert_full(root, rng):
    where = {k: root/f'CheXpert-v1.0 batch {k} ({w})'
             for k, w in enumerate(['validate & csv', 'train 1', 'train 2', 'train 3'], 1)}
    for split, first, n in (('valid', 64541, 4), ('train', 1, 21)):
        paths = chexpert_patients(first, n, split)
        for k, p in enumerate(paths):
            save(noise(rng, 39, 32), where[1]/p if split == 'valid' else where[2 + k//7]/p.removeprefix('train/'))
        table = chexpert_table([f'CheXpert-v1.0/{p}' for p in paths], rng, ABOUT)
        table.to_csv(where[1]/f'{split}.csv', index=False)
    (root/'train_cheXbert.csv').write_text('Path\n')
    (root/'README.md').write_text('CheXpert')

def chexlocalize(root, rng):
    "The later labels: other column order, no Sex and Age, paths that begin at the split, and `val` for `valid`."
    for split, first, prefix in (('val', 64541, 'CheXpert-v1.0/valid'), ('test', 64741, 'test')):
        paths = chexpert_patients(first, 4, split)
        paths.append(paths[0].replace('view1_frontal', 'view2_lateral'))
        for p in paths: save(noise(rng, 39, 32), root/'CheXpert'/p)
        names = ['Airspace Opacity' if o == 'Lung Opacity' else o for o in OBSERVATIONS[::-1]]
        table = chexpert_table([prefix + p.removeprefix(split) for p in paths], rng, names=names)
        table.to_csv(root/f'CheXpert/{split}_labels.csv', index=False)
    (root/'CheXlocalize').mkdir()
    (root/'CheXlocalize/gt_segmentations_test.json').write_text('{}')

@pytest.mark.parametrize('layout', [chexpert_small, chexpert_full])
@pytest.mark.parametrize('later', [False, True])
def test_chexpert(tmp_path, rng, layout, later):
    layout(tmp_path, rng)
    if later: chexlocalize(tmp_path/'chexlocalize', rng)
    cat = read_source(tmp_path)
    train(cat)
    groups = cat.groupby('split').group.agg(set)
    assert min(groups['test']) == ('patient64741' if later else 'patient64541') and len(groups['test']) == 4
    assert (min(groups['valid']) > 'patient6') == later, 'validation is taken out of training if it has to be'
    assert cat[cat.split == 'test'].sex.isna().all() == later
    assert 'lateral' not in ' '.join(cat.id) and cat['Lung Opacity'].notna().any()

def test_chexpert_with_train_csv_alone(tmp_path, rng):
    chexpert_small(tmp_path, rng, sets=['train'])
    train(read_source(tmp_path))

def test_chexpert_without_one_of_its_parts(tmp_path, rng):
    chexpert_full(tmp_path, rng)
    batch = tmp_path/'CheXpert-v1.0 batch 3 (train 2)'
    batch.rename(tmp_path.parent/f'{tmp_path.name}-away')
    with pytest.raises(FileNotFoundError, match=r'no folder patient00008.*7 patients are missing.*unpack all parts'):
        read_source(tmp_path)


# JSRT and SCR

def scr_masks():
    yy, xx = np.mgrid[:1024, :1024]
    def ellipse(y, x, h, w): return ((yy-y)/h)**2 + ((xx-x)/w)**2 < 1
    return {'right lung': ellipse(480, 300, 330, 170), 'left lung': ellipse(480, 720, 330, 170),
            'heart': ellipse(660, 570, 150, 170), 'right clavicle': ellipse(210, 330, 25, 150),
            'left clavicle': ellipse(210, 690, 25, 150)}

def test_jsrt(tmp_path, rng):
    masks = scr_masks()
    for k, name in enumerate(['JPCLN001', 'JPCLN002', 'JPCLN003', 'JPCNN001', 'JPCNN003']):
        save_jsrt(tmp_path, name, noise(rng, 64, 64), masks, f'fold{1 + (k == 1)}')
    junk = tmp_path/'__MACOSX/All247images/._JPCLN001.IMG'
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b'Mac OS X')
    cat = train(read_source(tmp_path))
    assert cat[cat.split == 'test'].id.tolist() == ['JPCLN002'] and cat.nodule.tolist() == [1, 1, 1, 0, 0]


# QaTa-COV19

@pytest.mark.parametrize('place', ['QaTa-COV19/QaTa-COV19-v2', 'archive/QaTa-COV19/QaTa-COV19-v2', 'QaTa-COV19-v2', '.'])
def test_qata(tmp_path, rng, place):
    names = {'Train Set': ['covid_1', 'covid_10', 'sub-S09340_ses-E18197_run-1_bp-chest_vp-ap_cr', 'covid_2', 'covid_3',
                           'sub-S09340_ses-E18201_run-1_bp-chest_vp-ap_cr'], 'Test Set': ['covid_99', 'covid_100']}
    for d, name in [(d, n) for d, ns in names.items() for n in ns]:
        save(noise(rng, 22, 22), tmp_path/place/d/f'Images/{name}.png')
        save(255*(noise(rng, 22, 22) > 150).astype(np.uint8), tmp_path/place/d/f'Ground-truths/mask_{name}.png')
    cat = train(read_source(tmp_path))
    assert sorted(cat[cat.split == 'test'].id) == ['covid_100', 'covid_99']


# Montgomery and Shenzhen

MASKED = [f'CHNCXR_{k:04d}_{k//327}' for k in (1, 2, 3, 327, 328)]

def montgomery(folder, rng):
    names = [f'MCUCXR_{k:04d}_{s}' for k, s in ((1, 0), (2, 0), (3, 0), (104, 1), (108, 1), (113, 1))]
    for name in names:
        size = rng.permutation([40, 49])   # upright and across
        save(noise(rng, *size), folder/f'CXR_png/{name}.png')
        for side in ('left', 'right'): save(noise(rng, *size) > 200, folder/f'ManualMask/{side}Mask/{name}.png')
        (folder/'ClinicalReadings').mkdir(exist_ok=True)
        (folder/f'ClinicalReadings/{name}.txt').write_text("Patient's Sex: F \nPatient's Age: 027Y\nnormal\n")
    (folder/'Thumbs.db').write_bytes(b'0')

def shenzhen(folder, rng):
    for name in [*MASKED, 'CHNCXR_0025_0', 'CHNCXR_0336_1']:
        path = folder/f'ChinaSet_AllFiles/CXR_png/{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(rng, 30, 29)).convert('P').save(path)
    for name in MASKED:
        mask = 255*(noise(rng, 30, 29) > 150).astype(np.uint8)
        save(mask, folder/f'shcxr-lung-mask/mask/mask/{name}_mask.png')
    save(noise(rng, 30, 29), folder/'ChinaSet_AllFiles/Annotations/CHNCXR_0327_1_Calcified_Nodule_2.png')

@pytest.mark.parametrize('unit', ['pixel', 'image'])
@pytest.mark.parametrize('layouts', [[montgomery], [shenzhen], [montgomery, shenzhen]])
def test_tuberculosis(tmp_path, rng, layouts, unit):
    for layout in layouts: layout(tmp_path/'MontgomerySet' if layout is montgomery else tmp_path, rng)
    cat = train(read_source(tmp_path, unit=unit))
    assert len(cat) == 6*(montgomery in layouts) + 7*(shenzhen in layouts)
    if unit == 'image': assert (cat.tuberculosis == [int(i[-1]) for i in cat.id]).all()
    bare = cat[[a.kind == 'unlabelled' for a in cat.annotation]]
    assert len(bare) == 2*(shenzhen in layouts) and (unit == 'image' or set(bare.split) <= {'train'})


# what is no data set, and what is two

def test_folders_that_are_not_known(tmp_path, rng):
    with pytest.raises(FileNotFoundError, match='holds no labels.csv, and is no data set that is known'):
        read_source(tmp_path)
    montgomery(tmp_path/'MontgomerySet', rng)
    duke(tmp_path/'2015_BOE_Chiu', rng, subjects=1)
    with pytest.raises(ValueError, match='several data sets, as .*Subject_01.mat and .*CXR_png tell'): read_source(tmp_path)

def test_a_data_set_that_cannot_be_written_to(tmp_path, rng, monkeypatch):
    duke(tmp_path/'duke', rng)
    def refuse(*args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('mlds.sources.oct.write_once', refuse)
    with pytest.raises(PermissionError, match='another place for the converted images, to='): read_source(tmp_path/'duke')


# the real images, back in the form in which they were published

def test_real_duke_as_mat(tmp_path):
    "The copy's PNGs as .mat files, with other scans between them that were not graded."
    source, chosen = DATA/'oct_duke_dme', duke_as_mat(tmp_path, 4, 4)
    cat = train(read_source(tmp_path), (48, 64))
    assert len(cat) == 16 and cat.group.nunique() == 4
    for row, i in zip(cat.itertuples(), chosen.id):
        assert np.array_equal(row.annotation.read(), np.asarray(Image.open(source/f'masks/{i}.png')))
        changed = read_image(row.image) != np.asarray(Image.open(source/f'images/{i}.png'))
        assert changed.mean() < .01, 'no more than the white at the border is lost'

def test_real_jsrt_as_raw_files(tmp_path):
    "The copy's PNGs as 2048 x 2048 big-endian files with GIF masks; what is read back is what was there."
    source, chosen = DATA/'cxr_jsrt', jsrt_as_raw(tmp_path, 4)
    cat = train(read_source(tmp_path), (64, 64))
    assert (cat.set_index('id').fold == chosen.set_index('id').scr_fold.map({'odd': 'fold1', 'even': 'fold2'})).all()
    for row in cat[::3].itertuples():
        before = np.asarray(Image.open(source/f'images/{row.id}.png').convert('L')).astype(float)
        assert np.corrcoef(before.ravel(), read_image(row.image).ravel())[0, 1] > .99
        stored, sets = np.asarray(Image.open(source/f'masks_bits/{row.id}.png')), row.annotation.read().numpy()
        for c, bit in ((1, 3), (2, 4), (3, 24)): assert np.array_equal(sets >> c & 1 > 0, stored & bit > 0)
