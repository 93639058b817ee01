"""The research images of `MLDS_DATA` in the forms in which users have them: converted here, from PNG files.

`MLDS_DATA` names the folder that holds the copies; without it shared/data beside the repository is tried. What
`python tests/real_images.py FOLDER` writes is what the tests use, but all of it."""
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

DATA = Path(os.environ.get('MLDS_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')
DUKE_SPACING = .0276, .0093, .125  # mm across, down, between scans: about that of the Spectralis, after resizing
SIDES = {'right lung': 1, 'left lung': 2, 'heart': 4, 'right clavicle': 8, 'left clavicle': 16}
COVID = {'lungs': 3, 'ground-glass': 16, 'consolidation': 32}  # bits of the copy's masks


def copy(name):
    "A research copy and its table; the test skips where it is not there."
    if not (DATA/name).is_dir(): pytest.skip(f'no research copy {name}: set MLDS_DATA to the folder that holds it')
    return DATA/name, pd.read_csv(DATA/name/'labels.csv', dtype=dict(id=str))

def pixels(path): return np.asarray(Image.open(path).convert('L'))

def save(values, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)

def duke_rows(subjects, scans):
    source, table = copy('oct_duke_dme')
    chosen = table[table.group.isin(sorted(table.group.unique())[:subjects])].groupby('group').head(scans)
    return source, chosen

def duke_volume(source, rows, where): return np.stack([pixels(source/where/f'{i}.png') for i in rows.id])


def save_nifti(volume, path):
    import SimpleITK as sitk
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(DUKE_SPACING)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, path)

def duke_as_nifti(to, subjects=10, scans=11, boxed=2, bare=1):
    "A NIfTI volume for each subject; the last ones have boxes of their pockets, or nothing, instead of a mask volume."
    source, chosen = duke_rows(subjects, scans)
    boxes = []
    for k, (name, rows) in enumerate(chosen.groupby('group')):
        save_nifti(duke_volume(source, rows, 'images'), to/f'images/{name}.nii.gz')
        if k < subjects - boxed - bare: save_nifti(duke_volume(source, rows, 'masks'), to/f'masks/{name}.nii.gz')
        elif k < subjects - bare: boxes += pocket_boxes(name, duke_volume(source, rows, 'instances'))
    pd.DataFrame(boxes, columns=['id', 'slice', 'class', 'x0', 'y0', 'x1', 'y1']).to_csv(to/'boxes.csv', index=False)
    names = sorted(chosen.group.unique())
    kinds = ['mask']*(subjects-boxed-bare) + ['boxes']*boxed + ['unlabelled']*bare
    pd.DataFrame(dict(id=names, group=names, kind=kinds)).to_csv(to/'labels.csv', index=False)
    (to/'classes.txt').write_text('background\nfluid\n')
    return to

def pocket_boxes(name, instances):
    "A box for each pocket of fluid that somebody drew."
    for k, scan in enumerate(instances):
        for pocket in np.unique(scan[scan > 0]):
            y, x = np.nonzero(scan == pocket)
            yield name, k, 'fluid', x.min(), y.min(), x.max() + 1, y.max() + 1

def duke_as_mat(to, subjects=10, scans=11):
    "Subject_01.mat and so on; between the graded scans lie others that were not graded."
    source, chosen = duke_rows(subjects, scans)
    to.mkdir(parents=True, exist_ok=True)
    for k, (_, rows) in enumerate(chosen.groupby('group'), 1):
        images, pockets = (np.moveaxis(duke_volume(source, rows, w), 0, -1) for w in ('images', 'instances'))
        fluid = np.full((*images.shape[:2], 2*len(rows)), np.nan)
        fluid[..., ::2] = pockets
        layers = np.where(np.isnan(fluid[:8]), np.nan, 100.)
        arrays = dict(images=np.repeat(images, 2, -1), manualFluid1=fluid, manualLayers1=layers)
        savemat(to/f'Subject_{k:02d}.mat', arrays, do_compression=True)
    return chosen


def save_jsrt(folder, name, image, masks, fold):
    "An image of 0..255 with dark lungs as JSRT stores it: 12 bits, inverted, high byte first, without header."
    (folder/'All247images').mkdir(parents=True, exist_ok=True)
    big = np.asarray(Image.fromarray(image).resize((2048, 2048), Image.NEAREST))
    (4095 - big.astype('>u2')*16).astype('>u2').tofile(folder/f'All247images/{name}.IMG')
    for structure, mask in masks.items():
        large = Image.fromarray((mask*255).astype(np.uint8)).resize((1024, 1024), Image.NEAREST)
        path = folder/f'scratch/{fold}/masks/{structure}/{name}.gif'
        path.parent.mkdir(parents=True, exist_ok=True)
        large.save(path)

def jsrt_as_raw(to, each=30):
    "JSRT and SCR as they are unpacked, 2048 x 2048 big-endian, `each` images of either half."
    source, table = copy('cxr_jsrt')
    chosen = table.groupby('scr_fold').head(each)
    for row in chosen.itertuples():
        stored = np.asarray(Image.open(source/f'masks_bits/{row.id}.png'))
        masks = {name: stored & bit > 0 for name, bit in SIDES.items()}
        save_jsrt(to, row.id, pixels(source/f'images/{row.id}.png'), masks, {'odd': 'fold1', 'even': 'fold2'}[row.scr_fold])
    return chosen


def covid_as_masks(to, expert=100, lungs_only=60, bare=40):
    "Overlapping masks, a folder for each class; in some images only lungs were looked for, and others have nothing."
    source, table = copy('cxr_covid')
    drawn = table[table.has_expert_mask == 1].head(expert)
    lungs = table[(table.has_expert_mask == 0) & (table.has_v7_lungs == 1)].head(lungs_only)
    none = table[(table.has_expert_mask == 0) & (table.has_v7_lungs == 0)].head(bare)
    for i in drawn.id:
        stored = np.asarray(Image.open(source/f'masks_bits/{i}.png'))
        for name, bits in COVID.items():
            if (stored & bits).any(): save(np.uint8(255*(stored & bits > 0)), to/f'masks/{name}/{i}.png')
    for i in lungs.id: save(np.uint8(255*(pixels(source/f'lungs_v7/{i}.png') > 0)), to/f'masks/lungs/{i}.png')
    rows = pd.concat([drawn.assign(kind='mask', looked_for=''), lungs.assign(kind='mask', looked_for='lungs'),
                      none.assign(kind='', looked_for='')])
    for i in rows.id: save(pixels(source/f'images/{i}.png'), to/f'images/{i}.png')
    rows.assign(group=rows.split_group)[['id', 'group', 'kind', 'looked_for']].to_csv(to/'labels.csv', index=False)
    (to/'classes.txt').write_text('\n'.join(['background', *COVID]) + '\n')
    return rows

def covid_as_infection(to):
    "The images with an expert's masks, ground-glass and consolidation as one class; patients with near-duplicates merged."
    source, table = copy('cxr_covid')
    drawn = table[table.has_expert_mask == 1]
    for i in drawn.id:
        save(pixels(source/f'images/{i}.png'), to/f'images/{i}.png')
        stored = np.asarray(Image.open(source/f'masks_bits/{i}.png'))
        save(np.uint8(stored & (COVID['ground-glass'] | COVID['consolidation']) > 0), to/f'masks/{i}.png')
    drawn.assign(group=drawn.split_group)[['id', 'group']].to_csv(to/'labels.csv', index=False)
    (to/'classes.txt').write_text('background\ninfection\n')
    return drawn


if __name__ == '__main__':
    root = Path(sys.argv[1])
    duke_as_nifti(root/'duke_nifti')
    duke_as_mat(root/'duke_mat')
    jsrt_as_raw(root/'jsrt_raw')
    covid_as_masks(root/'covid')
    covid_as_infection(root/'covid_infection')
