("Batches of `mlds.dataloaders` with and without reading processes, their device and counts; "
 "budgets choose the images they always chose.")
import errno
import hashlib
import os
import subprocess
import sys
from collections import Counter
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from fastai.torch_core import default_device
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlds.annotations import KINDS, Boxes, weaken
from mlds.catalogue import Catalogue, simulate_budget, split_groups, unlabelled_rows
from mlds.folders import read_folder
from mlds.classsets import EVERYTHING, TIGHT
from mlds.dataloaders import CatalogueDataset, _Cache, _pack_sets, _unpack_sets, make_dataloaders, prepare_image
from mlds.files import read_image
from mlds.phantoms.oct import save_phantoms
from mlds.task import Task

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def eyes(tmp_path_factory):
    folder = save_phantoms(tmp_path_factory.mktemp('data')/'eyes', 8, 3, (32, 48), seed=1)
    return simulate_budget(split_groups(read_folder(folder), seed=0), 5, 'boxes')


def loaders(cat, **kwargs):
    defaults = dict(quota=dict(mask=2, boxes=3), iterations=4, tfms=[], seed=0)
    return make_dataloaders(cat, **(defaults | kwargs))

def who(dls):
    "For every training batch the positions of its images."
    items = {x.numpy().tobytes(): i for i, (x, _) in enumerate(dls.train.dataset)}
    return [[items[x.cpu().numpy().tobytes()] for x in batch] for batch, _ in dls.train]


@pytest.mark.parametrize('workers', [0, 2])
def test_every_batch_holds_its_quota(eyes, workers):
    dls = loaders(eyes, num_workers=workers)
    batches, kinds = who(dls), dls.train.dataset.kinds
    assert [[kinds[i] for i in b] for b in batches] == [['mask']*2 + ['boxes']*3]*4
    assert dls.train.drawn == {'mask': 8, 'boxes': 12}
    masked = [i for b in batches for i in b[:2]]
    there = [i for i, k in enumerate(kinds) if k == 'mask']
    assert sorted(masked[:5]) == there, 'every image once before any comes again'
    assert who(dls) != batches


def test_reading_processes_change_nothing(eyes): assert who(loaders(eyes, num_workers=2)) == who(loaders(eyes))

def test_the_seed_decides_the_order(eyes):
    assert who(loaders(eyes, seed=3)) == who(loaders(eyes, seed=3)) != who(loaders(eyes, seed=4))


def test_a_look_at_one_batch_does_not_count_as_an_epoch(eyes):
    dls = loaders(eyes)
    dls.one_batch()
    assert sum(dls.train.drawn.values()) <= 5


def test_batches_go_to_the_default_device(eyes):
    "A learner trains where its loaders are: without a device, a GPU would stand idle."
    dls = loaders(eyes)
    assert dls.device == default_device()
    assert dls.train.one_batch()[0].device.type == default_device().type


def test_a_batch_larger_than_its_kind(eyes):
    dls = loaders(eyes, quota=dict(mask=7, boxes=1), iterations=2)
    batches = who(dls)
    assert [len(b) for b in batches] == [8, 8] and set(Counter(i for b in batches for i in b[:7]).values()) <= {2, 3}


def test_validation_is_in_order_and_without_change(eyes):
    dls = make_dataloaders(eyes, quota=dict(mask=1, boxes=1), iterations=1)
    seen = torch.cat([x.cpu() for x, _ in dls.valid])
    items = torch.stack([x for x, _ in dls.valid.dataset])
    assert torch.equal(seen, items) and len(seen) == (eyes.split == 'valid').sum()


def stored(folder, pixels):
    Image.fromarray(pixels).save(folder/'a.png')
    return unlabelled_rows(folder/'a.png', Task(['background', 'fluid']))


@pytest.mark.parametrize('size', [(50, 70), (16, 20), (32, 48), (100, 30)])
def test_images_of_any_size_become_items_of_one(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)
    x, sets = CatalogueDataset(stored(tmp_path, pixels), (32, 48))[0]
    assert x.shape == (1, 32, 48) and sets.shape == (3, 32, 48) and abs(x.mean()) < 1e-4 and abs(x.std() - 1) < .01


@pytest.mark.parametrize('normalise', ['image', 'unit'])
def test_a_new_image_is_prepared_as_in_training(tmp_path, normalise):
    ("Noise is averaged away when an image shrinks: "
     "one that is standardized before it is resized is too pale for the network.")
    rows = stored(tmp_path, np.random.default_rng(0).integers(0, 255, (128, 192)).astype(np.uint8))
    item = CatalogueDataset(rows, (32, 48), normalise)[0][0]
    new = prepare_image(read_image(tmp_path/'a.png'), (32, 48), normalise)
    assert torch.equal(new, item.as_subclass(torch.Tensor))
    assert normalise == 'unit' or abs(new.std() - 1) < .01


def test_new_images_come_in_batches_as_in_training(eyes):
    dls = loaders(eyes)
    new = dls.test_dl(eyes.image.tolist()[:5], bs=2, num_workers=0)
    seen = torch.cat([b[0].cpu() for b in new])
    assert torch.equal(seen, torch.stack([CatalogueDataset(eyes[:5])[i][0] for i in range(5)]))


# where items are kept

def test_images_of_labels_are_kept_as_bytes(eyes):
    "A quarter of the memory, and the same numbers with and without."
    cat = Catalogue(eyes, Task(['IRF', 'SRF'], unit='image'))
    kept, fresh = CatalogueDataset(cat), CatalogueDataset(cat, cache=False)
    for _ in range(2): assert all(torch.equal(kept[i][0], fresh[i][0]) for i in range(4))
    assert kept.cache[0, 0][0].dtype == np.uint8 and fresh.cache is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32-1))
def test_packed_sets_come_back_bit_for_bit(k, h, w, seed):
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 2, 3, EVERYTHING, TIGHT, TIGHT | 5, -2**63, 2**63-1])
    triples = rng.choice(values, (k, 3))
    sets = torch.from_numpy(triples[rng.integers(0, k, h*w)].T.reshape(3, h, w).copy())
    palette, index = _pack_sets(sets)
    assert torch.equal(_unpack_sets(palette, index), sets) and index.dtype == np.uint8
    assert palette.shape[1] <= k

def mixed(cat, kinds=KINDS):
    "Every kind of annotation among the training images."
    def weak(i, row): return row.annotation if row.split != 'train' else weaken(row.annotation, kinds[i % len(kinds)], 4)
    return cat.assign(annotation=[weak(i, row) for i, row in enumerate(cat.itertuples())])

def batches(cat, **kwargs):
    dls = make_dataloaders(cat, **(dict(bs=2*len(KINDS), iterations=3, seed=3, device='cpu') | kwargs))
    return [(x.clone(), y.clone()) for _ in range(2) for dl in (dls.train, dls.valid) for x, y in dl]

@pytest.mark.parametrize('size', [None, (20, 31)])
def test_where_items_are_kept_changes_no_bit(twelve, tmp_path, size):
    "Neither in the first epoch nor in the second, transforms included."
    uncached = batches(mixed(twelve), size=size, cache=False)
    for cache in (True, 1e-5, 0, tmp_path):
        for (x, y), (a, b) in zip(batches(mixed(twelve), size=size, cache=cache), uncached, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b) and type(y) is type(b)

def test_the_batches_are_those_of_earlier_versions(twelve):
    "Class sets are whole numbers, the same on every machine."
    older = [k for k in KINDS if k != 'loose jittered boxes']
    sets = [y.numpy() for _, y in batches(mixed(twelve, older), bs=2*len(older), tfms=[], size=(16, 24))]
    assert hashlib.sha256(b''.join(y.tobytes() for y in sets)).hexdigest()[:16] == '64bec7892e48e723'

def test_no_more_is_kept_in_memory_than_was_said(twelve):
    dls = make_dataloaders(twelve, cache=2e-5, device='cpu')
    for dl in (dls.train, dls.valid): assert all(dl.dataset[i] for i in range(len(dl.dataset)))
    cache = dls.train.dataset.cache
    assert cache is dls.valid_ds.cache
    inside = sum(a.nbytes for arrays in cache.kept.values() for a in arrays)
    read = sum((twelve.split == s).sum() for s in ('train', 'valid'))
    assert 1.5e4 < inside <= 2e4 and len(cache.kept) + len(os.listdir(cache.folder)) == read

@pytest.mark.parametrize('workers', [0, 2])
def test_what_is_kept_is_not_read_again(tmp_path, workers):
    "Neither by the reading processes of a later epoch, which are new ones."
    folder = save_phantoms(tmp_path/'eyes', 6, 2, (32, 48), seed=1)
    dls = loaders(split_groups(read_folder(folder), seed=0), quota=dict(mask=4), cache=1e-5, num_workers=workers)
    for _ in dls.train: pass
    (folder/'images').rename(tmp_path/'away')
    for _ in dls.train: pass

def writes(cache):
    for _ in range(200): cache[0, 0] = (np.zeros(5000), np.arange(10))

def test_two_processes_write_one_file(tmp_path):
    "A reader sees a complete file at any time."
    cache = _Cache(0, tmp_path)
    cache[0, 0] = (np.zeros(5000), np.arange(10))
    writers = [get_context('fork').Process(target=writes, args=(cache,)) for _ in range(2)]
    for w in writers: w.start()
    while any(w.is_alive() for w in writers): assert [len(a) for a in cache[0, 0]] == [5000, 10]
    for w in writers: w.join()
    assert [w.exitcode for w in writers] == [0, 0] and os.listdir(cache.folder) == ['0-0']

def test_a_full_disk_stops_nothing(twelve, monkeypatch):
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('mlds.dataloaders.np.save', full)
    data = CatalogueDataset(twelve, cache=0)
    with pytest.warns(UserWarning, match=r'cannot be kept in .*No space left.*cache=FOLDER'): item = data[0]
    with pytest.warns(UserWarning): assert torch.equal(data[0][0], item[0])
    assert os.listdir(data.cache.folder) == []

def test_files_go_with_their_process(tmp_path):
    code = ('import sys, numpy as np; from mlds.dataloaders import _Cache; cache = _Cache(0, sys.argv[1]); '
            'cache[0, 0] = (np.ones(3),); import os; print(len(os.listdir(sys.argv[1])))')
    done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True)
    assert done.stdout == '1\n' and not os.listdir(tmp_path), done.stderr


@pytest.mark.parametrize('change', [
    lambda c: c[c.split == 'train'], lambda c: c.assign(age=3), lambda c: c.reset_index(drop=True),
    lambda c: c.groupby('group').head(1), lambda c: c.sample(3, random_state=0), lambda c: c.drop(columns='split'),
    lambda c: c.merge(c[['id']].assign(sex='f'), on='id'), lambda c: c.query("split == 'valid'")])
def test_the_task_stays_with_the_catalogue(eyes, change): assert change(eyes).task == eyes.task


# budgets: what the functions chose that `simulate_budget` replaced

CHOICES = {
    'thin_out 3, seed 0': (dict(masks=3, seed=0), 'v000_s01 v002_s01 v006_s00'),
    'thin_out 1, seed 0': (dict(masks=1, seed=0), 'v000_s01'),
    'thin_out 7, seed 0': (dict(masks=7, seed=0), 'v000_s01 v002_s01 v003_s02 v006_s00 v006_s01 v007_s00 v007_s01'),
    'limit_pool 5, seed 0': (dict(pool=5, seed=0), 'v000_s01 v003_s02 v006_s00 v006_s01 v007_s01'),
    'limit_pool 5 positive, seed 0': (dict(pool=5, positive_only=True, seed=0),
                                      'v000_s01 v003_s01 v004_s01 v006_s02 v011_s01'),
    'take_fraction .3, seed 0': (dict(masks=.3, by='groups', seed=0),
                                 'v002_s00 v002_s01 v002_s02 v006_s00 v006_s01 v006_s02 v007_s00'),
    'take_fraction .05, seed 0': (dict(masks=.05, by='groups', seed=0), 'v002_s01'),
    'weaken_rows 4, seed 0': (dict(masks=4, seed=0), 'v000_s01 v002_s01 v006_s00 v006_s01'),
    'thin_out 3, seed 1': (dict(masks=3, seed=1), 'v000_s01 v002_s01 v010_s00'),
    'limit_pool 5, seed 1': (dict(pool=5, seed=1), 'v000_s02 v002_s00 v002_s01 v003_s02 v010_s00'),
    'limit_pool 5 positive, seed 1': (dict(pool=5, positive_only=True, seed=1),
                                      'v002_s00 v002_s01 v003_s01 v010_s00 v010_s01'),
    'take_fraction .3, seed 1': (dict(masks=.3, by='groups', seed=1),
                                 'v002_s00 v002_s01 v002_s02 v004_s00 v004_s01 v004_s02 v010_s00'),
    'take_fraction .05, seed 1': (dict(masks=.05, by='groups', seed=1), 'v002_s01'),
    'weaken_rows 4, seed 1': (dict(masks=4, seed=1), 'v000_s01 v000_s02 v002_s01 v010_s00'),
    'thin_out 3, seed 2': (dict(masks=3, seed=2), 'v000_s01 v000_s02 v002_s01'),
    'limit_pool 5, seed 2': (dict(pool=5, seed=2), 'v000_s01 v000_s02 v002_s02 v004_s02 v011_s02'),
    'limit_pool 5 positive, seed 2': (dict(pool=5, positive_only=True, seed=2),
                                      'v000_s01 v002_s00 v002_s01 v003_s02 v010_s01'),
    'take_fraction .3, seed 2': (dict(masks=.3, by='groups', seed=2),
                                 'v004_s00 v004_s01 v004_s02 v006_s00 v007_s00 v007_s01 v007_s02'),
    'take_fraction .05, seed 2': (dict(masks=.05, by='groups', seed=2), 'v007_s01'),
    'weaken_rows 4, seed 2': (dict(masks=4, seed=2), 'v000_s01 v000_s02 v002_s01 v011_s01'),
}

@pytest.fixture(scope='module')
def twelve(tmp_path_factory):
    folder = save_phantoms(tmp_path_factory.mktemp('data')/'twelve', 12, 3, (32, 48), seed=1)
    return split_groups(read_folder(folder), seed=0)

@pytest.mark.parametrize('case', CHOICES)
def test_budgets_choose_as_before(twelve, case):
    given, ids = CHOICES[case]
    chosen = simulate_budget(twelve, **given)
    assert chosen[chosen.split == 'train'].id.tolist() == ids.split()
    weak = simulate_budget(twelve, **(given | dict(kind='boxes')))
    masked = weak[(weak.split == 'train') & weak.annotation.map(lambda a: a.kind == 'mask')]
    assert masked.id.tolist() == ids.split(), 'those that are not weakened are those that are not dropped'
    for side in ('valid', 'test'): assert chosen[chosen.split == side].equals(twelve[twelve.split == side])

def test_a_function_may_stand_in_for_a_kind(twelve):
    few = simulate_budget(twelve, 4, lambda row: Boxes([(1, 0, 0, len(row.id), 1)]))
    boxes = [a for a in few.annotation if a.kind == 'boxes']
    assert len(boxes) == (twelve.split == 'train').sum() - 4 and boxes[0] == Boxes([(1, 0, 0, 8, 1)])
