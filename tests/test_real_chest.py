"""The readers of the resized research copies on the copies themselves.

`MLDS_DATA` names the folder that holds cxr_jsrt, cxr_covid and cxr_kermany_labels; without it shared/data beside the
repository is tried, and where neither exists the tests skip."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mlds.catalogue import check_catalogue
from mlds.files import read_image
from mlds.sources.chest import chest_folders, read_chest, read_covid, read_jsrt_png, read_kermany

DATA = Path(os.environ.get('MLDS_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')


def folder(name):
    "The copy of that name; skips where it is absent."
    if not (DATA/name).is_dir(): pytest.skip(f"no research copy {name}: set MLDS_DATA to the folder that holds it")
    return DATA/name

def sizes(rows): return rows.split.value_counts().to_dict()
def together(rows): return rows.groupby('group').split.nunique().max() == 1
def shares(rows):
    "The mean share of the pixels whose set holds a class, for each class."
    masks, classes = [a.read() for a in rows.annotation], range(rows.task.n_classes)
    return np.mean([[(m >> c & 1).float().mean().item() for c in classes] for m in masks], axis=0)


@pytest.mark.parametrize('train, test', [('odd', 123), ('even', 124)])
def test_jsrt_halves(train, test):
    rows = read_jsrt_png(folder('cxr_jsrt'), train=train)
    assert len(rows) == rows.group.nunique() == 247 and sizes(rows)['test'] == test
    assert set(rows[rows.split != 'test'].scr_fold) == {train}

def test_jsrt_masks():
    rows = read_jsrt_png(folder('cxr_jsrt'))
    check_catalogue(rows[::8])
    assert rows.task.classes == ('background', 'lungs', 'heart', 'clavicles') and rows.task.overlapping
    assert shares(rows)[1:] == pytest.approx([.305, .091, .019], abs=.001)
    for row in rows[::40].itertuples():  # air is dark, the heart is not
        image, sets = read_image(row.image), row.annotation.read().numpy()
        assert image[sets == 2].mean() < image[sets == 4].mean()

def test_kermany():
    rows = read_kermany(folder('cxr_kermany_labels'))
    observations = list(rows.task.classes)
    assert rows.task.unit == 'image'
    assert len(rows) == 5808 and sizes(rows)['test'] == 618 and together(rows)
    assert rows[rows.split != 'test'][observations].sum().tolist() == [1340, 2512, 1338]
    assert rows[rows.split == 'test'][observations].sum().tolist() == [231, 240, 147]
    assert (rows[observations].sum(axis=1) == 1).all()
    check_catalogue(rows[::200])

def test_covid_masks():
    rows = read_covid(folder('cxr_covid'))
    assert len(rows) == 100 and rows.group.nunique() == 73 and together(rows)
    check_catalogue(rows)
    empty = rows[[not (a.read() == 2).any() for a in rows.annotation]]
    findings = empty[['Ground-Glass Opacity', 'Consolidation']].max(axis=1)
    assert findings.tolist().count(0) == 5
    assert empty[findings == 1].id.tolist() == ['cxrec1db781']  # its opacity was named, not drawn

def test_covid_unlabelled_images_keep_out_of_validation_and_test():
    masked, more = [read_covid(folder('cxr_covid'), unlabelled=u) for u in (False, True)]
    kinds = more.groupby('split').annotation.agg(lambda s: {a.kind for a in s})
    assert kinds['valid'] == kinds['test'] == {'mask'} and kinds['train'] == {'mask', 'unlabelled'}
    assert together(more) and set(masked.id) < set(more.id) and len(more) <= 558

def test_covid_findings():
    rows = read_covid(folder('cxr_covid'), unit='image')
    assert len(rows) == 558 and rows.group.nunique() == 328 and together(rows) and rows.task.unit == 'image'
    check_catalogue(rows[::10])
    known = rows.label_known == 1
    assert rows.loc[~known, ['No Finding', 'COVID-19']].isna().all(axis=None) and (~known).any()
    assert rows.loc[known, 'COVID-19'].notna().all()
    masked = rows[[a.kind == 'mask' for a in rows.annotation]]
    named = ['Ground-Glass Opacity', 'Consolidation', 'Pleural Effusion', 'Pneumothorax']
    assert masked[named].sum().tolist() == [93, 32, 2, 1]

def test_the_data_folder_is_recognised():
    for name in ('cxr_jsrt', 'cxr_covid', 'cxr_kermany_labels'): folder(name)
    found = chest_folders(DATA)
    names = dict(findings='cxr_kermany_labels', anatomy='cxr_jsrt', infection='cxr_covid')
    assert {t: f.name for t, f in found.items()} == names
    cats = {t: read_chest(f, t) for t, f in found.items()}
    assert {t: len(c) for t, c in cats.items()} == dict(findings=5808, anatomy=247, infection=100)
    assert all(set(c.split) == {'train', 'valid', 'test'} for c in cats.values())

@pytest.mark.parametrize('name, read, dealt', [
    ('cxr_jsrt', read_jsrt_png, 'efe788bf2b95'), ('cxr_kermany_labels', read_kermany, '4d865e712348'),
    ('cxr_covid', read_covid, '24f5810d55f7')])
def test_the_splits_of_seed_0_are_those_of_earlier_results(name, read, dealt):
    rows = read(folder(name))
    text = json.dumps([rows.id.tolist(), rows.split.tolist()])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == dealt
