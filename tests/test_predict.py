"Predictions of files in every format, resumed or not, of tiles and of several networks; scores; ONNX."
import json, shutil, warnings

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from mlds import learner
from mlds.annotations import Boxes, Mask
from mlds.catalogue import Catalogue, unlabelled_rows
from mlds.files import ImageSlice, image_slices, read_image, read_mask
from mlds.learner import evaluate, predict, predict_folder
from mlds.models import ModelSpec, export_onnx, grey_profile, load_model, make_network, save_model
from mlds.phantoms.chest import chest_phantoms
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.task import Task

sitk, pydicom = pytest.importorskip('SimpleITK'), pytest.importorskip('pydicom')

TASK = Task(OCT_CLASSES)
SIZE = 24, 40


def network(task=TASK, seed=0, size=(32, 32), encoder='', **kwargs):
    "A tiny network whose weights are random."
    torch.manual_seed(seed)
    shape = {} if task.unit == 'image' else dict(width=4, depth=2, head_width=8)
    model = make_network(task, 'test_resnet' if task.unit == 'image' else encoder, **shape, **kwargs).eval()
    model.spec.size = size
    return model

@pytest.fixture(scope='module')
def model(): return network()

def pixels(seed=0, slices=None):
    shape = SIZE if slices is None else (slices, *SIZE)
    return np.random.default_rng(seed).integers(1, 200, shape).astype(np.uint8)


def test_maps_of_classes_with_any_name(tmp_path):
    "Each in a folder of its own below the output, whatever a class is called."
    names = ['background', 'a/b', 'a_b', '..', 'a%2Fb', 'fluid (all)', 'Ödem']
    folder, probs = tmp_path/'out', np.random.rand(1, len(names), *SIZE).astype(np.float32)
    learner._Output(folder, Task(names), False, True).maps('scan', np.zeros(SIZE), probs)
    written = sorted(p.relative_to(folder/'probabilities').as_posix() for p in tmp_path.rglob('*.tif'))
    places = ['background', 'a%2Fb', 'a_b', '%2E%2E', 'a%252Fb', 'fluid (all)', 'Ödem']
    assert written == sorted(f'{p}/scan.tif' for p in places)
    for k, place in enumerate(places): assert np.allclose(read_image(folder/f'probabilities/{place}/scan.tif'), probs[0, k])


def save_dicom(path, image, patient='Doe^Jane'):
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
    d = pydicom.Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = SecondaryCaptureImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.PatientName, d.PatientID, d.PatientBirthDate, d.Modality = patient, 'secret-17', '19700101', 'OP'
    d.Rows, d.Columns = image.shape[-2:]
    d.SamplesPerPixel, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 1, 8, 8, 7, 0
    d.PhotometricInterpretation, d.PixelSpacing = 'MONOCHROME2', [.5, .25]
    if image.ndim == 3: d.NumberOfFrames = len(image)
    d.PixelData = image.tobytes()
    d.save_as(path, enforce_file_format=True)

def save_itk(path, image, spacing=(.25, .5, 2.)):
    written = sitk.GetImageFromArray(image)
    written.SetSpacing(spacing[:image.ndim])
    written.SetOrigin((10., 20., 30.)[:image.ndim])
    sitk.WriteImage(written, str(path))

@pytest.fixture
def images(tmp_path):
    "A folder with an image or a volume of each format."
    folder = tmp_path/'images'
    folder.mkdir()
    Image.fromarray(pixels(0)).save(folder/'one.png')
    Image.fromarray(pixels(1)).save(folder/'two.jpg')
    tifffile.imwrite(folder/'deep.tif', pixels(2).astype(np.uint16)*100)
    tifffile.imwrite(folder/'pages.tif', pixels(3, 3), photometric='minisblack')
    for i, suffix in enumerate(('nii.gz', 'nii', 'nrrd', 'mha')):
        save_itk(folder/f'volume{i}.{suffix}', pixels(4+i, 3))
    save_dicom(folder/'scanner.dcm', pixels(9))
    save_dicom(folder/'frames.dcm', pixels(10, 3))
    return folder

MASKS = dict(one='.png', two='.png', deep='.png', pages='.tif', volume0='.nii.gz', volume1='.nii', volume2='.nrrd',
             volume3='.mha', scanner='.nrrd', frames='.nrrd')


# Formats

def test_masks_have_format_size_and_geometry_of_their_images(model, images, tmp_path):
    out = tmp_path/'masks'
    table = predict_folder(model, images, out, bar=False)
    assert {p.name for p in out.iterdir()} == {f'{k}{v}' for k, v in MASKS.items()} | {
        'predictions.csv', 'volumes.csv', '.predictions.jsonl'}
    rows = unlabelled_rows(images, TASK)
    assert table.id.tolist() == rows.id.tolist()
    for row, image in zip(table.itertuples(), rows.image):
        k = image.slice if isinstance(image, ImageSlice) else None
        mask = read_mask(row.file, slice=k)
        assert mask.shape == SIZE and np.array_equal(mask, predict(model, image))
    for name in ('volume0.nii.gz', 'volume1.nii', 'volume2.nrrd', 'volume3.mha'):
        image, mask = (sitk.ReadImage(folder/name) for folder in (images, out))
        assert mask.GetSpacing() == pytest.approx(image.GetSpacing()) and mask.GetSize() == image.GetSize()
        assert mask.GetOrigin() == image.GetOrigin() and mask.GetDirection() == image.GetDirection()


def test_areas_are_in_mm_where_the_file_says_how_large_a_pixel_is(model, images, tmp_path):
    table = predict_folder(model, images, tmp_path/'masks', bar=False).set_index('id')
    assert (table[list(OCT_CLASSES)].sum(axis=1) == np.prod(SIZE)).all()
    for name in ('one', 'two', 'deep', 'pages/0'): assert table.loc[name, ['background mm2', 'IRF mm2']].isna().all()
    for name in ('scanner', 'volume0/1', 'frames/2'):
        assert table.loc[name, 'IRF mm2'] == pytest.approx(table.loc[name, 'IRF']*.125)
    volumes = pd.read_csv(tmp_path/'masks/volumes.csv', dtype=dict(id=str)).set_index('id')
    assert volumes.index.tolist() == ['frames', 'pages', 'volume0', 'volume1', 'volume2', 'volume3']
    assert (volumes.slices == 3).all()
    for name in volumes.index: assert volumes.loc[name, 'SRF'] == table[table.index.str.startswith(f'{name}/')].SRF.sum()
    assert volumes.loc['volume2', 'SRF mm3'] == pytest.approx(volumes.loc['volume2', 'SRF']*.25)
    assert volumes.loc[['frames', 'pages'], 'SRF mm3'].isna().all()  # the distance of their slices is not stated


def test_nothing_of_a_patient_leaves_the_scanner_file(model, images, tmp_path):
    predict_folder(model, images, tmp_path/'masks', overlay=True, probabilities=True, bar=False)
    for file in (tmp_path/'masks').rglob('*'):
        if not file.is_file(): continue
        content = file.read_bytes()
        assert b'secret' not in content and b'Doe' not in content, file
        if file.suffix in ('.nrrd', '.nii', '.mha'):
            read = sitk.ReadImage(str(file))
            assert not [k for k in read.GetMetaDataKeys() if 'Jane' in read.GetMetaData(k)]


def test_overlays_and_probabilities(model, images, tmp_path):
    out = tmp_path/'masks'
    predict_folder(model, images, out, overlay=True, probabilities=True, bar=False)
    rows = unlabelled_rows(images, TASK)
    for name, image in zip(rows.id, rows.image):
        with Image.open(out/f'overlays/{name}.png') as picture: assert picture.width > 500
        probs = predict(model, image, probabilities=True)
        stem, k = name.split('/')[0], getattr(image, 'slice', None)
        suffix = {'.png': '.tif'}.get(MASKS[stem], MASKS[stem])
        for c, expected in zip(OCT_CLASSES, probs):
            np.testing.assert_allclose(read_image(out/f'probabilities/{c}/{stem}{suffix}', slice=k), expected, atol=1e-6)


def test_overlapping_classes_and_colours(tmp_path):
    model = network(Task(OCT_CLASSES, overlapping=True, channels=3))
    colours = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path/'c.png')
    table = predict_folder(model, [tmp_path/'c.png'], tmp_path/'out', overlay=True, bar=False)
    mask = read_mask(table.file[0])
    assert np.array_equal(mask, predict(model, tmp_path/'c.png'))
    assert [table[c][0] for c in OCT_CLASSES] == [(mask >> c & 1).sum() for c in range(4)]
    again = Mask(table.file[0], bits=True).class_sets(SIZE, 4).certain
    assert np.array_equal(again, mask), 'what is predicted can be corrected and read as a mask'


def test_an_empty_slice_is_background(model, tmp_path):
    volume = pixels(0, 3)
    volume[1] = 7
    save_itk(tmp_path/'v.nii.gz', volume)
    table = predict_folder(model, tmp_path/'v.nii.gz', tmp_path/'out', overlay=True, bar=False)
    assert table.background[1] == np.prod(SIZE) and not read_mask(table.file[1], slice=1).any()
    assert np.array_equal(read_mask(table.file[0], slice=2), predict(model, volume[2]))


def test_rows_of_a_catalogue_name_slices_and_folders(model, images, tmp_path):
    ids = ['eye/0', 'eye/2', 'left/x']
    files = [ImageSlice(images/'volume0.nii.gz', 0), ImageSlice(images/'volume0.nii.gz', 2), images/'one.png']
    masks = [Mask(np.zeros(SIZE, int))]*3
    cat = Catalogue(dict(id=ids, group=ids, image=files, annotation=masks), TASK)
    table = predict_folder(model, cat, tmp_path/'out', bar=False)
    assert table.id.tolist() == ['eye/0', 'eye/1', 'eye/2', 'left/x']  # a volume is always whole
    assert image_slices(tmp_path/'out/eye.nii.gz') == 3 and (tmp_path/'out/left/x.png').exists()
    scores = evaluate(model, cat, bar=False)
    assert np.array_equal(scores.pred[1], read_mask(tmp_path/'out/eye.nii.gz', slice=2))


def test_classifiers(images, tmp_path):
    model = network(Task(['IRF', 'SRF'], unit='image'))
    table = predict_folder(model, images, tmp_path/'out', bar=False)
    assert table.columns.tolist() == ['id', 'IRF', 'SRF'] and len(table) == len(unlabelled_rows(images, TASK))
    assert table.set_index('id').loc['one', 'SRF'] == pytest.approx(predict(model, images/'one.png')['SRF'])
    assert not list((tmp_path/'out').glob('*.png'))
    with pytest.raises(ValueError, match='tiles are for labels of pixels'): predict(model, images/'one.png', tiles=.5)


# Nothing is lost

def listing(folder): return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file() and p.suffix != '.csv'}

def test_it_goes_on_after_an_interruption(model, images, tmp_path, monkeypatch):
    whole = predict_folder(model, images, tmp_path/'whole', bar=False)
    seen, real = [], learner._look
    def broken(models, image, **kwargs):
        if len(seen) == 6: raise KeyboardInterrupt
        seen.append(image)
        return real(models, image, **kwargs)
    monkeypatch.setattr(learner, '_look', broken)
    with pytest.raises(KeyboardInterrupt): predict_folder(model, images, tmp_path/'out', bar=False)
    assert not (tmp_path/'out/predictions.csv').exists() and not list((tmp_path/'out').glob('*.tmp'))
    done = listing(tmp_path/'out')
    with open(tmp_path/'out/.predictions.jsonl', 'a') as f: f.write('{"name": "cut o')  # killed while it wrote
    monkeypatch.setattr(learner, '_look', real)
    table = predict_folder(model, images, tmp_path/'out', bar=False)
    after = listing(tmp_path/'out')
    assert all(after[p] == t for p, t in done.items() if p.name[0] != '.')
    pd.testing.assert_frame_equal(table.drop(columns='file'), whole.drop(columns='file'))
    for p in (tmp_path/'whole').glob('*.csv'):
        assert p.read_text().replace('/whole/', '/out/') == (tmp_path/'out'/p.name).read_text()


def test_what_has_changed_is_predicted_again(model, images, tmp_path):
    predict_folder(model, images, tmp_path/'out', bar=False)
    before = listing(tmp_path/'out')
    Image.fromarray(pixels(77)).save(images/'one.png')
    (tmp_path/'out/two.png').unlink()
    predict_folder(model, images, tmp_path/'out', bar=False)
    changed = {p.name for p, t in listing(tmp_path/'out').items() if t != before[p]}
    assert changed - {'.predictions.jsonl'} == {'one.png', 'two.png'}
    assert np.array_equal(read_mask(tmp_path/'out/one.png'), predict(model, images/'one.png'))
    other = network(seed=1)
    predict_folder(other, images, tmp_path/'out', bar=False)
    assert np.array_equal(read_mask(tmp_path/'out/two.png'), predict(other, images/'two.jpg'))


def test_no_image_and_no_drawn_mask_is_replaced(model, images, tmp_path):
    before = {p: p.read_bytes() for p in images.iterdir()}
    with pytest.raises(ValueError, match='images holds images: choose another folder'):
        predict_folder(model, images, images, bar=False)
    link = tmp_path/'link'
    link.symlink_to(images)
    with pytest.raises(ValueError, match='holds images'): predict_folder(model, images, link, bar=False)
    drawn = tmp_path/'masks'
    drawn.mkdir()
    Image.fromarray(pixels(5)).save(drawn/'two.tif')
    with pytest.raises(FileExistsError, match='two.tif is there already'): predict_folder(model, images, drawn, bar=False)
    assert {p.name for p in drawn.iterdir()} == {'two.tif'}
    evil = unlabelled_rows(images/'one.png', TASK).assign(id='../../evil')
    with pytest.raises(ValueError, match='id ../../evil leads out of'): predict_folder(model, evil, tmp_path/'o', bar=False)
    assert {p: p.read_bytes() for p in images.iterdir()} == before


def test_a_corrected_mask_is_not_replaced(model, images, tmp_path):
    predict_folder(model, images, tmp_path/'out', bar=False)
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path/'out/one.png')
    predict_folder(model, images, tmp_path/'out', bar=False)
    assert read_mask(tmp_path/'out/one.png').all()
    with pytest.raises(FileExistsError, match='one.png is there already and not as a prediction'):
        predict_folder(network(seed=1), images, tmp_path/'out', bar=False)
    assert read_mask(tmp_path/'out/one.png').all()
    (images/'one.png').rename(images/'three.png')
    predict_folder(network(seed=1), images, tmp_path/'out', bar=False)  # all but the corrected one
    (images/'three.png').rename(images/'one.png')
    with pytest.raises(FileExistsError, match='one.png is there already'):
        predict_folder(network(seed=1), images, tmp_path/'out', bar=False)


def test_a_mask_that_was_drawn_meanwhile_is_not_replaced_but_one_in_the_making_is(model, images, tmp_path, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(learner._Journal, 'add', killed)  # the first mask is written, and not noted
        predict_folder(model, images, tmp_path/'out', bar=False)
    assert [p.name for p in (tmp_path/'out').glob('[a-z]*')] == ['deep.png']
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path/'out/two.png')
    with pytest.raises(FileExistsError, match='two.png is there already'):
        predict_folder(model, images, tmp_path/'out', bar=False)
    (tmp_path/'out/two.png').unlink()
    predict_folder(model, images, tmp_path/'out', bar=False)
    assert np.array_equal(read_mask(tmp_path/'out/two.png'), predict(model, images/'two.jpg'))


# Tiles, ensembles, grey values

@pytest.mark.parametrize('overlap', [0, .25, .5, .8])
@pytest.mark.parametrize('shape', [(32, 32), (33, 70), (20, 90), (100, 31)])
def test_a_pixelwise_network_says_the_same_in_tiles(shape, overlap):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 4, 1)
    image = np.random.default_rng(0).normal(size=shape)
    net.spec = ModelSpec(TASK)
    whole = predict(net, image, probabilities=True)
    net.spec = ModelSpec(TASK, size=(32, 32))
    np.testing.assert_allclose(predict(net, image, probabilities=True, tiles=overlap), whole, atol=1e-6)


def test_networks_that_disagree(tmp_path, model):
    image = pixels()
    same = network(seed=1, size=(16, 48))
    mean = np.mean([predict(m, image, probabilities=True) for m in (model, same)], 0)
    np.testing.assert_allclose(predict([model, same], image, probabilities=True), mean, atol=1e-6)
    Image.fromarray(image).save(tmp_path/'i.png')
    table = predict_folder([model, same], [tmp_path/'i.png'], tmp_path/'both', bar=False)
    assert np.array_equal(read_mask(table.file[0]), mean.argmax(0))
    cat = Catalogue(dict(id=['i'], group=['i'], image=[image], annotation=[Mask(np.zeros(SIZE, int))]), TASK)
    assert np.array_equal(evaluate([model, same], cat, bar=False).pred[0], mean.argmax(0))
    wrong = {'classes background, IRF, SRF, PED of the first, but classes background, SRF, IRF, PED of':
             Task(['background', 'SRF', 'IRF', 'PED']), 'overlapping False of the first, but overlapping True':
             Task(OCT_CLASSES, overlapping=True), 'channels 1 of the first, but channels 3': Task(OCT_CLASSES, channels=3)}
    for message, task in wrong.items():
        file = save_model(network(task), tmp_path/'other.safetensors')
        for call in (lambda: predict([model, file], image), lambda: evaluate([model, file], cat, bar=False),
                     lambda: predict_folder([model, file], [tmp_path/'i.png'], tmp_path/'o', bar=False)):
            with pytest.raises(ValueError, match=f'{message}.*other.safetensors' if 'of' == message[-2:] else message): call()


def told(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        result = f(*args, **kwargs)
    return result, [str(w.message) for w in found if 'grey values' in str(w.message)]

@pytest.mark.parametrize('normalise', ['image', 'unit'])
def test_grey_values_far_from_those_of_the_training(normalise, tmp_path):
    from mlds.dataloaders import prepare_image
    scans = oct_phantoms(volumes=8, scans=4, size=64, seed=0).image.tolist()
    others = oct_phantoms(volumes=8, scans=4, size=96, seed=1).image.tolist()
    chests = [row['image'] for row in chest_phantoms('anatomy', 5, 64)]
    def shift(images):  # grey values from 0 up
        return [(i - i.min())/np.ptp(i) for i in images] if normalise == 'unit' else images
    scans, others, chests = map(shift, (scans, others, chests))
    model = network(size=(64, 64))
    model.spec.normalise = normalise
    model.spec.grey = grey_profile([prepare_image(i.astype(np.float32), (64, 64), normalise) for i in scans])
    model = load_model(save_model(model, tmp_path/'m.safetensors'))
    table, warned = told(predict_folder, model, others, tmp_path/'same', bar=False)
    assert warned == [] and 'warning' not in table
    if normalise == 'image':  # another device's offset and scale do not matter
        assert told(predict, model, others[0].astype(float)*1000 + 99)[1] == []
    table, warned = told(predict_folder, model, chests, tmp_path/'other', bar=False)
    assert len(warned) == 4 and warned[0].startswith('image 0: its grey values are far from the training images')
    assert warned[3].startswith('5 of 5 images') and table.warning.notna().all()
    assert 'warning' in pd.read_csv(tmp_path/'other/predictions.csv')
    Image.fromarray((chests[0]*255).clip(0, 255).astype(np.uint8)).save(tmp_path/'chest17.png')
    assert 'chest17.png: its grey values' in told(predict, model, tmp_path/'chest17.png')[1][0]


def test_memory_does_not_grow_with_the_images(model, tmp_path, monkeypatch):
    "Masks and pixels of one image are gone before the next is looked at."
    import gc, weakref
    alive, real = [], learner._look
    def watched(models, image, **kwargs):
        gc.collect()
        assert sum(a() is not None for a in alive) <= 1
        found = real(models, image, **kwargs)
        alive.append(weakref.ref(found[0]))
        return found
    monkeypatch.setattr(learner, '_look', watched)
    (tmp_path/'in').mkdir()
    for i in range(6): Image.fromarray(pixels(i)).save(tmp_path/f'in/{i}.png')
    predict_folder(model, tmp_path/'in', tmp_path/'out', bar=False)
    assert len(alive) == 6


# Scores

def test_scores_by_class_and_image_with_intervals(model, tmp_path):
    task = Task(OCT_CLASSES, spacing=(2., 2.))
    rng = np.random.default_rng(0)
    images = [rng.normal(size=SIZE) for _ in range(6)]
    masks = [predict(model, i).astype(int) for i in images]
    masks[0] = np.roll(masks[0], 2, 1)
    annotation = [*map(Mask, masks[:5]), Boxes([[1, 0, 0, 10, 10]])]
    cat = Catalogue(dict(id=list('abcdef'), group=list('112233'), image=images, annotation=annotation), task)
    net = network(task)
    scores = evaluate(net, cat, distances=True, bar=False)
    table = scores.by_image
    assert table.columns.tolist() == ['id', 'group', 'class', 'known', 'IoU', 'Dice', 'HD95 mm'] and len(table) == 24
    assert scores.partly == 1 and table.known.iloc[-1] == pytest.approx(1 - 100/np.prod(SIZE))
    perfect = table[table.id.isin(list('bcde')) & (table['class'] != 'background')]
    assert (perfect.IoU.dropna() == 1).all() and (perfect['HD95 mm'].dropna() == 0).all() and len(perfect.dropna())
    moved = table[(table.id == 'a') & (table['class'] != 'background')]
    assert (moved.Dice.dropna() < 1).all() and moved['HD95 mm'].max() > 0
    assert table['HD95 mm'][table.id == 'f'].isna().all()
    assert {'IoU low', 'Dice high', 'HD95 mm low', 'HD95 mm images'} <= {*scores.table}
    assert '1 of 6 images in part only' in repr(scores)
    plain = evaluate(net, cat, bar=False)
    assert plain.table.equals(scores.table[plain.table.columns]) and 'HD95 mm' not in plain.by_image
    with pytest.raises(TypeError, match='distanses: labels of pixels have no such option'):
        evaluate(net, cat, distanses=True, bar=False)


# ONNX

@pytest.mark.parametrize('task', [TASK, Task(OCT_CLASSES, overlapping=True, channels=3), Task(['IRF', 'SRF'], unit='image')])
def test_onnx_says_what_torch_says(task, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    from mlds.dataloaders import prepare_image
    model = network(task)
    file = save_model(model, tmp_path/'m.safetensors')
    shape = SIZE if task.channels == 1 else (*SIZE, 3)
    images = [np.random.default_rng(i).uniform(0, 1, shape).astype(np.float32) for i in range(3)]
    assert export_onnx(file, tmp_path/'m.onnx', images) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['classes']) == list(task.classes) and json.loads(about['size']) == [32, 32]
    assert about['normalise'] == model.spec.normalise and about['unit'] == task.unit
    x = torch.stack([prepare_image(i, (32, 32), model.spec.normalise) for i in images]).numpy()
    for n in (1, 2, 3):
        out, = session.run(['probabilities'], dict(image=x[:n]))
        assert len(out) == n
    found = out[0] if task.unit == 'image' else None
    if found is not None: np.testing.assert_allclose(found, list(predict(model, images[0]).values()), atol=1e-4)
    with pytest.raises(ValueError, match='no.onnx was not written: its probabilities differ'):
        export_onnx(model, tmp_path/'no.onnx', images, tolerance=-1)
    assert not (tmp_path/'no.onnx').exists()
