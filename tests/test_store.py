"The store of labels after accidents: flipped bits, cut files, writers that were killed, and two writers at once."
import os, shutil, signal
from itertools import count
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlds import store as module
from mlds.annotations import Unlabelled
from mlds.attribution import integrated_gradients
from mlds.catalogue import Catalogue
from mlds.classsets import class_sets
from mlds.store import LabelStore, make_labels
from mlds.task import Task

CLASSES, SIZE = ['background', 'Lung Lesion', 'Pneumothorax'], (8, 8)
IDS = [f'image {i}' for i in range(5)]
SETS = [class_sets(torch.randint(1, 8, SIZE, generator=torch.Generator().manual_seed(i))) for i in range(5)]

fork = get_context('fork')

def fill(folder, params=None):
    "Add what is missing to a store of shards of two images."
    with LabelStore(folder, CLASSES, SIZE, params or {}, shard=2) as store:
        for i in store.missing(IDS): store.append(i, SETS[IDS.index(i)])
    return store

def content(folder): return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix in ('.bin', '.json')}

def in_child(function, *args):
    "The exit code of a process that calls the function."
    child = fork.Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode

@pytest.fixture
def whole(tmp_path):
    fill(tmp_path/'whole')
    return tmp_path/'whole'


def test_every_flipped_bit_is_noticed(whole):
    store, files = LabelStore(whole), content(whole)
    expect = ['00000.bin', '00000.json', '00001.bin', '00001.json', '00002.bin', '00002.json', 'store.json']
    assert sorted(files) == expect
    for name, data in files.items():
        for bit in range(8*len(data)):
            changed = bytearray(data)
            changed[bit//8] ^= 1 << bit % 8
            (whole/name).write_bytes(changed)
            with pytest.raises(ValueError, match='damaged'): store.verify()
            if name.endswith('.json'):
                with pytest.raises(ValueError, match='damaged'): LabelStore(whole)
        (whole/name).write_bytes(data)
    assert store.verify() == LabelStore(whole).verify() == 5

def test_no_flipped_bit_changes_a_label(whole):
    "Whoever reads without `verify` gets the label that was written or an error."
    for name, data in content(whole).items():
        for bit in range(0, 8*len(data), 5):
            changed = bytearray(data)
            changed[bit//8] ^= 1 << bit % 8
            (whole/name).write_bytes(changed)
            try: store = LabelStore(whole)
            except ValueError: continue
            for i, sets in zip(IDS, SETS):
                try: assert torch.equal(store.sets(i), sets)
                except ValueError as e: assert 'damaged' in str(e)
        (whole/name).write_bytes(data)

@pytest.mark.parametrize('damage', [
    lambda b: b'', lambda b: b[:-1], lambda b: b[1:], lambda b: b + b'\n', lambda b: b[:5] + b[6:]],
    ids=['empty', 'end lost', 'start lost', 'more', 'hole'])
def test_other_damage_is_noticed(whole, damage):
    store = LabelStore(whole)
    for name, data in content(whole).items():
        (whole/name).write_bytes(damage(data))
        with pytest.raises(ValueError, match='damaged'): store.verify()
        (whole/name).write_bytes(data)

@pytest.mark.parametrize('name', ['00001.bin', '00001.json'])
def test_a_damaged_shard_is_made_anew(whole, name):
    before = content(whole)
    (whole/name).write_bytes(before[name][:9])
    with pytest.raises(ValueError, match='00001.bin or its .json is damaged: delete both'): LabelStore(whole).verify()
    for suffix in 'bin', 'json': (whole/f'00001.{suffix}').unlink()
    assert LabelStore(whole).missing(IDS) == IDS[2:4]
    fill(whole)
    assert content(whole) == before

def test_a_lost_json_is_written_anew(whole):
    before = content(whole)
    (whole/'00000.json').unlink()
    assert LabelStore(whole).missing(IDS) == IDS[:2]
    fill(whole)
    assert content(whole) == before


def killed_at(n, before):
    "Make the n-th replacement of a file the last thing that this process does, or nearly does."
    calls, replace = count(), os.replace
    def replace_(*args):
        if not before: replace(*args)
        if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
        if before: replace(*args)
    os.replace = replace_

def fill_until_killed(folder, n, before):
    killed_at(n, before)
    fill(folder)

@pytest.mark.parametrize('before', [True, False], ids=['before it counts', 'after'])
@pytest.mark.parametrize('n', range(7))
def test_a_killed_writer_leaves_whole_shards(whole, tmp_path, n, before):
    folder = tmp_path/'killed'
    assert in_child(fill_until_killed, folder, n, before) == -signal.SIGKILL
    if n or not before:
        done = (n + (not before) - 1)//2 # of store.json, then two files a shard
        assert list(LabelStore(folder)) == IDS[:2*done]
        assert LabelStore(folder).verify() == len(IDS[:2*done])
    fill(folder)
    assert content(folder) == content(whole)

def test_one_process_writes_at_a_time(whole):
    other = {**dict(zip(IDS, SETS)), 'mine': SETS[0]}
    def write_too():
        store = LabelStore(whole)
        assert torch.equal(store.sets(IDS[0]), SETS[0])
        with pytest.raises(RuntimeError, match='is in use by process'): store.append('theirs', SETS[0])
    with LabelStore(whole) as store:
        store.append('mine', SETS[0])
        assert in_child(write_too) == 0
    assert sorted(LabelStore(whole)) == sorted(other)
    assert in_child(lambda: LabelStore(whole).append('theirs', SETS[0])) == 0

def test_an_error_drops_what_was_gathered(whole):
    with pytest.raises(KeyboardInterrupt), LabelStore(whole) as store:
        store.append('new', SETS[0])
        raise KeyboardInterrupt
    assert LabelStore(whole).missing(['new']) == ['new']

def test_labels_of_two_recipes_do_not_mix(whole):
    with pytest.raises(ValueError, match='has other params'): fill(whole, dict(steps=8))


class Spots(nn.Module):
    "Logits of bright and dark spots, and of neither."
    def __init__(self, width):
        super().__init__()
        self.width, self.gain = width, nn.Parameter(torch.tensor(20. + width))
    def forward(self, x):
        means = F.avg_pool2d(x, self.width, 1)
        bright, dark = means.amax((1, 2, 3)) - .7, .3 - means.amin((1, 2, 3))
        return self.gain * torch.stack([-torch.maximum(bright, dark), bright, dark], 1)

def catalogue(n=12, side=16):
    rng, names = np.random.default_rng(0), ['No Finding', 'Lung Lesion', 'Pneumothorax']
    images = [rng.uniform(.4, .6, (side, side)).astype(np.float32) for _ in range(n)]
    for i in images: i[3:8, 3:8], i[9:14, 8:13] = .95, .05
    ids = [f'{i:02d}' for i in range(n)]
    rows = pd.DataFrame(dict(id=ids, group=ids, image=images, annotation=[Unlabelled()]*n))
    return Catalogue(rows.assign(**dict(zip(names, [0., 1., 1.]))), Task(names, unit='image'))

def label(folder, kill=None):
    "Label the catalogue in batches of 2 and shards of 5 images; killed at an attribution if asked to."
    calls = count()
    def attribute(*args, **kwargs):
        if next(calls) == kill: os.kill(os.getpid(), signal.SIGKILL)
        return integrated_gradients(*args, **kwargs)
    attribute.__name__ = 'integrated_gradients'
    return make_labels([Spots(3), Spots(5)], catalogue(), folder, (16, 16), attribute=attribute, bs=2, shard=5, steps=4)

@pytest.mark.parametrize('kill, left', [(0, 0), (5, 0), (6, 5), (11, 5), (13, 10)])
def test_a_killed_labelling_goes_on_to_the_same_bytes(tmp_path, kill, left):
    label(tmp_path/'whole')
    assert in_child(label, tmp_path/'killed', kill) == -signal.SIGKILL
    assert len(LabelStore(tmp_path/'killed')) == left
    label(tmp_path/'killed')
    assert content(tmp_path/'killed') == content(tmp_path/'whole')

def test_a_store_of_the_first_version_is_read_and_continued(whole, tmp_path, monkeypatch):
    import json
    def seal(head): return json.dumps(dict(head, version=1) if 'version' in head else head).encode()
    monkeypatch.setattr(module, '_seal', seal)
    with LabelStore(tmp_path/'first', CLASSES, SIZE, {}, shard=2) as store:
        for i, sets in zip(IDS[:2], SETS): store.append(i, sets)
    monkeypatch.undo()
    assert not any(b'checksum' in f.read_bytes() for f in (tmp_path/'first').glob('*.json'))
    first = LabelStore(tmp_path/'first')
    assert first.verify() == 2 and torch.equal(first.sets(IDS[1]), SETS[1])
    fill(tmp_path/'first')
    assert LabelStore(tmp_path/'first').verify() == 5
