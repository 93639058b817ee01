"""Real images as their owners have them, from `mlds check` to `mlds evaluate`.

Duke DME as NIfTI volumes and as .mat files, JSRT as raw big-endian files with GIF masks, the COVID-19 images with
overlapping masks, a folder for each class: converted by `real_images.py` from the PNG files of the research copies."""
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from mlds.cli import main
from mlds.dataloaders import make_dataloaders
from mlds.catalogue import split_groups
from mlds.learner import fit, make_learner
from mlds.models import save_model
from mlds.sources.chest import read_data
from real_images import covid_as_masks, duke_as_mat, duke_as_nifti, jsrt_as_raw

torch.set_num_threads(1)

LAYOUTS = {  # what writes it, images, kinds of annotation, classes, and the folder that `mlds predict` takes
    'duke as NIfTI': (lambda to: duke_as_nifti(to, 6, 3), 18, {'mask', 'boxes', 'unlabelled'}, 'fluid', 'images'),
    'duke as .mat': (lambda to: duke_as_mat(to, 4, 2), 8, {'mask'}, 'fluid', ''),
    'JSRT raw': (lambda to: jsrt_as_raw(to, 3), 6, {'mask'}, 'clavicles', ''),
    'COVID-19': (lambda to: covid_as_masks(to, 8, 3, 2), 13, {'mask', 'partial mask', 'unlabelled'}, 'consolidation',
                 'images')}

def trained(data, file, to):
    "A model after two iterations."
    cat = read_data(data, check=False, to=to)
    cat = cat if 'split' in cat else split_groups(cat, .25, .25)
    dls = make_dataloaders(cat, bs=6, size=(32, 48), iterations=2, seed=0, device='cpu')
    learn = make_learner(dls, network=dict(width=2, depth=2, head_width=4))
    fit(learn, epochs=1, bar=False)
    return save_model(learn, file)

@pytest.mark.parametrize('layout', LAYOUTS)
def test_from_check_to_evaluate(tmp_path, capsys, layout):
    write, images, kinds, name, place = LAYOUTS[layout]
    data, out = tmp_path/'data', tmp_path/'out'
    write(data)
    out.mkdir()
    before = {f: f.stat().st_mtime_ns for f in data.rglob('*')}
    assert main(['check', data, '--sheet', out/'sheet.png']) == 0
    said = capsys.readouterr().out
    assert f'{images} images, 0 problems' in said and (out/'sheet.png').exists()
    trained(data, out/'model.safetensors', out/'converted')
    assert {a.kind for a in read_data(data, check=False, to=out/'converted').annotation} == kinds
    assert main(['predict', out/'model.safetensors', data/place, '--out', out/'masks']) == 0
    table = pd.read_csv(out/'masks/predictions.csv')
    assert len(table) == images and name in table
    assert main(['evaluate', out/'model.safetensors', data, '--out', out/'scores']) == 0
    assert name in pd.read_csv(out/'scores/scores.csv')['class'].tolist()
    assert {f: f.stat().st_mtime_ns for f in data.rglob('*')} == before, 'nothing is written into the data'
    if 'NIfTI' in layout: same_geometry(data/'images/subject01.nii.gz', out/'masks/subject01.nii.gz', table)

def same_geometry(image, mask, table):
    image, mask = sitk.ReadImage(image), sitk.ReadImage(mask)
    assert image.GetSize() == mask.GetSize() and np.allclose(image.GetSpacing(), mask.GetSpacing())
    assert np.allclose(table['fluid mm2'], table.fluid*.0276*.0093, rtol=1e-3)
