"""The readers of the resized research copies on the copies themselves.

`MLDS_DATA` names the folder that holds cxr_jsrt, cxr_covid and cxr_kermany_labels; without it shared/data beside the
repository is tried, and where neither exists the tests skip."""
import os
from pathlib import Path

import numpy as np
import pytest

from mlds.sources.chest import read_covid, read_jsrt_png, read_kermany
from mlds.catalogue import check_catalogue, read_image

DATA = Path(os.environ.get('MLDS_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')


def folder(name):
    "The copy of that name; skips where it is absent."
    if not (DATA/name).is_dir(): pytest.skip(f"no research copy {name}: set MLDS_DATA to the folder that holds it")
    return DATA/name

def sizes(rows): return rows.split.value_counts().to_dict()
def together(rows): return rows.groupby('group').split.nunique().max() == 1
def shares(rows, n_classes):
    "The mean share of the pixels whose set holds a class, for each class."
    return np.mean([[(m >> c & 1).float().mean().item() for c in range(n_classes)] for m in (a.read() for a in rows.annotation)], axis=0)


@pytest.mark.parametrize('train, test', [('odd', 123), ('even', 124)])
def test_jsrt_halves(train, test):
    rows, _ = read_jsrt_png(folder('cxr_jsrt'), train=train)
    assert len(rows) == rows.group.nunique() == 247 and sizes(rows)['test'] == test
    assert set(rows[rows.split != 'test'].scr_fold) == {train}

def test_jsrt_masks():
    rows, classes = read_jsrt_png(folder('cxr_jsrt'))
    check_catalogue(rows[::8], classes)
    assert shares(rows, 4)[1:] == pytest.approx([.305, .091, .019], abs=.001)
    for row in rows[::40].itertuples():  # air is dark, the heart is not
        image, sets = read_image(row.image), row.annotation.read().numpy()
        assert image[sets == 2].mean() < image[sets == 4].mean()

def test_kermany():
    rows, classes, observations = read_kermany(folder('cxr_kermany_labels'))
    assert len(rows) == 5808 and sizes(rows)['test'] == 618 and together(rows)
    assert rows[rows.split != 'test'][observations].sum().tolist() == [1340, 2512, 1338]
    assert rows[rows.split == 'test'][observations].sum().tolist() == [231, 240, 147]
    assert (rows[observations].sum(axis=1) == 1).all()
    check_catalogue(rows[::200], classes)

def test_covid_masks():
    rows, classes, _ = read_covid(folder('cxr_covid'))
    assert len(rows) == 100 and rows.group.nunique() == 73 and together(rows)
    check_catalogue(rows, classes)
    empty = rows[[not (a.read() == 2).any() for a in rows.annotation]]
    findings = empty[['Ground-Glass Opacity', 'Consolidation']].max(axis=1)
    assert findings.tolist().count(0) == 5 and empty[findings == 1].id.tolist() == ['cxrec1db781']  # its opacity was named, not drawn

def test_covid_unlabelled_images_keep_out_of_validation_and_test():
    masked, more = [read_covid(folder('cxr_covid'), unlabelled=u)[0] for u in (False, True)]
    kinds = more.groupby('split').annotation.agg(lambda s: {a.kind for a in s})
    assert kinds['valid'] == kinds['test'] == {'mask'} and kinds['train'] == {'mask', 'unlabelled'}
    assert together(more) and set(masked.id) < set(more.id) and len(more) <= 558

def test_covid_findings():
    rows, _, observations = read_covid(folder('cxr_covid'), unlabelled=True)
    known = rows.label_known == 1
    assert rows.loc[~known, ['No Finding', 'COVID-19']].isna().all(axis=None) and (~known).any()
    assert rows.loc[known, 'COVID-19'].notna().all()
    masked = rows[[a.kind == 'mask' for a in rows.annotation]]
    assert masked[['Ground-Glass Opacity', 'Consolidation', 'Pleural Effusion', 'Pneumothorax']].sum().tolist() == [93, 32, 2, 1]
