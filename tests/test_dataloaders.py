"Batches of `mlds.dataloaders` with and without reading processes, their device and counts; prediction sees images as training does."
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import default_device
from PIL import Image

from mlds.annotations import Unlabelled
from mlds.dataloaders import ClassSetDataset, mixed_dataloaders
from mlds.catalogue import read_folder, split_groups, simulate_budget
from mlds.learner import predict_image
from mlds.phantoms.oct import save_phantoms
from mlds.unet import Prediction

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def eyes(tmp_path_factory):
    folder = save_phantoms(tmp_path_factory.mktemp('data')/'eyes', 8, 3, (32, 48), seed=1)
    rows, classes = read_folder(folder)
    return simulate_budget(split_groups(rows, seed=0), 5, 'boxes', len(classes), seed=0), classes


def loaders(eyes, **kwargs): return mixed_dataloaders(*eyes, **{**dict(quota=dict(mask=2, boxes=3), iterations=4, tfms=[], seed=0), **kwargs})

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
    assert sorted(masked[:5]) == [i for i, k in enumerate(kinds) if k == 'mask'], 'every image once before any comes again'
    assert who(dls) != batches


def test_reading_processes_change_nothing(eyes): assert who(loaders(eyes, num_workers=2)) == who(loaders(eyes))
def test_the_seed_decides_the_order(eyes): assert who(loaders(eyes, seed=3)) == who(loaders(eyes, seed=3)) != who(loaders(eyes, seed=4))


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
    dls = mixed_dataloaders(*eyes, quota=dict(mask=1, boxes=1), iterations=1)
    seen = torch.cat([x.cpu() for x, _ in dls.valid])
    assert torch.equal(seen, torch.stack([x for x, _ in dls.valid.dataset])) and len(seen) == (eyes[0].split == 'valid').sum()


def row(folder, pixels):
    Image.fromarray(pixels).save(folder/'a.png')
    return pd.DataFrame(dict(id=['a'], image=[folder/'a.png'], annotation=[Unlabelled()]))


@pytest.mark.parametrize('size', [(50, 70), (16, 20), (32, 48), (100, 30)])
def test_images_of_any_size_become_items_of_one(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)
    x, sets = ClassSetDataset(row(tmp_path, pixels), ['background', 'fluid'], (32, 48))[0]
    assert x.shape == (1, 32, 48) and sets.shape == (3, 32, 48) and abs(x.mean()) < 1e-4 and abs(x.std() - 1) < .01


class Mirror(torch.nn.Module):
    "Remembers what it was shown."
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))
    def forward(self, x):
        self.seen = x
        return Prediction(torch.cat([x, self.one - x], 1), [])


def test_a_new_image_is_prepared_as_in_training(tmp_path):
    "Noise is averaged away when an image shrinks: one that is standardized before it is resized is too pale for the network."
    pixels, model = np.random.default_rng(0).integers(0, 255, (128, 192)).astype(np.uint8), Mirror()
    item, _ = ClassSetDataset(row(tmp_path, pixels), ['background', 'fluid'], (32, 48))[0]
    predict_image(model, tmp_path/'a.png', (32, 48))
    torch.testing.assert_close(model.seen[0].cpu(), item.as_subclass(torch.Tensor), atol=.02, rtol=0)
