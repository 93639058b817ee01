"""Memory of a training's data against the number of images: python benchmarks/memory.py [TABLE.md [IMAGES ...]]

Each cell is a process of its own, which makes dataloaders for images of 224x224 pixels with a mask of four classes, reads
every training image once, and reports by how much the memory grew that it and its reading processes hold alone. A
hundred files are listed repeatedly: what is kept is kept for each row of the table all the same."""
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from mlds.annotations import Mask
from mlds.catalogue import Catalogue
from mlds.dataloaders import make_dataloaders
from mlds.task import Task

COUNTS = 100, 1000, 10_000
KEEP = {'in memory (the default, up to 4 GB)': dict(cache=True), 'at most 200 MB in memory': dict(cache=.2),
        'in files': dict(cache='FOLDER'), 'not kept': dict(cache=False),
        'in files, two reading processes': dict(cache=True, num_workers=2)}
SIZE, DISTINCT = 224, 100


def write_images(folder):
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:SIZE, :SIZE]
    for k in range(DISTINCT):
        shade = 40*np.sin(yy/(9 + k % 7)) + 40*np.cos(xx/(11 + k % 5)) + rng.normal(128, 12, (SIZE, SIZE))
        mask = sum((np.hypot(yy - y, xx - x) < r).astype(np.uint8) for y, x, r in rng.uniform(30, 190, (3, 3)))
        Image.fromarray(shade.clip(0, 255).astype(np.uint8)).save(f'{folder}/image{k}.png')
        Image.fromarray(mask.astype(np.uint8)).save(f'{folder}/mask{k}.png')

def catalogue(folder, n):
    rows = range(n + 10)
    masks = [Mask(f'{folder}/mask{k % DISTINCT}.png') for k in rows]
    table = dict(id=list(map(str, rows)), group=list(rows), split=['train']*n + ['valid']*10, annotation=masks)
    table['image'] = [f'{folder}/image{k % DISTINCT}.png' for k in rows]
    return Catalogue(table, Task(['background', 'a', 'b', 'c']))

def held():
    "MB that this process and its children hold alone."
    own = psutil.Process()
    return sum(p.memory_full_info().uss for p in [own, *own.children(recursive=True)])/1e6

def read_all(cat, n, most=50, **options):
    "The largest growth of memory, MB, seen while every image is read once."
    before, peak = held(), 0
    dls = make_dataloaders(cat, bs=10, iterations=n//10, tfms=[], seed=0, device='cpu', **options)
    for i, _ in enumerate(dls.train):
        if i % max(n//10//most, 1) == 0: peak = max(peak, held() - before)
    return max(peak, held() - before)

def measure(folder, n, options, answer):
    torch.set_num_threads(1)
    read_all(catalogue(folder, 20), 20, cache=False) # what a first batch needs in any case
    given = {k: folder if v == 'FOLDER' else v for k, v in options.items()}
    answer.put(round(read_all(catalogue(folder, n), n, **given)))

def main(to=None, *counts, start=multiprocessing.get_context('fork')):
    lines = [f"| {' | '.join(['images', *KEEP])} |", '|---'*(len(KEEP) + 1) + '|']
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        for n in map(int, counts or COUNTS):
            cells = []
            for options in KEEP.values():
                answer = start.Queue()
                start.Process(target=measure, args=(folder, n, options, answer)).start()
                cells.append(answer.get())
                print(n, options, cells[-1], 'MB', flush=True)
            lines.append(f"| {n:,} | {' | '.join(f'{mb:,} MB' for mb in cells)} |")
    if to: Path(to).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main(*sys.argv[1:])
