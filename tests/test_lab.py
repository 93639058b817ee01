"""The tour in JupyterLab, driven by Chromium: run all, move a slider, draw a box with the mouse.

All of its cells up to the end of its text, with trainings of a few iterations, so that starting Python and the browser
is most of the time; at full length it is executed as a notebook."""
import importlib.util, json, os, re, shutil, socket, subprocess, sys, time
from urllib.request import urlopen

import nbformat
import psutil
import pytest

from conftest import ROOT

NEEDED = ['jupyterlab', 'ipywidgets', 'ipyevents', 'selenium']
CHROME = [shutil.which('chromium'), shutil.which('chromedriver')]
PATIENCE = 400  # seconds, of a machine that does other things
QUIET = {'@jupyterlab/apputils-extension:notification': dict(fetchNews='false', checkForUpdates=False),
         '@jupyterlab/notebook-extension:tracker': dict(windowingMode='none')}  # all cells are on the page

pytestmark = [pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason='needs `pip install .[dev,docs]`'),
              pytest.mark.skipif(not all(CHROME), reason='needs Chromium and its driver, see CONTRIBUTING')]


def tour():
    "The code of the tour, trainings shortened, without the cells that hold it to numbers."
    nb = nbformat.read(ROOT/'nbs/tour.ipynb', 4)
    end = next(i for i, c in enumerate(nb.cells) if c.source.startswith('## From here'))
    nb.cells = [c for c in nb.cells[:end] if c.cell_type == 'code']
    lengths = [re.subn(r'iterations=\d+', 'iterations=4', c.source) for c in nb.cells]
    assert sum(n for _, n in lengths) == 2
    for cell, (source, _) in zip(nb.cells, lengths): cell.source, cell.outputs = source, []
    return nb

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def until(condition, what, seconds=PATIENCE):
    "Wait for something; what it gave."
    end = time.time() + seconds
    while time.time() < end:
        if found := condition(): return found
        time.sleep(.1)
    raise AssertionError(f'{what}: not within {seconds} s')

def answers(address):
    try: return urlopen(address, timeout=5).status == 200
    except OSError: return False

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab with settings of its own, its address and folder."
    folder = tmp_path_factory.mktemp('lab')
    nbformat.write(tour(), folder/'tour.ipynb')
    (folder/'config/labconfig').mkdir(parents=True)
    (folder/'config/labconfig/default_setting_overrides.json').write_text(json.dumps(QUIET))
    own = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_RUNTIME_DIR='runtime', JUPYTERLAB_SETTINGS_DIR='settings',
               JUPYTERLAB_WORKSPACES_DIR='workspaces', JUPYTER_DATA_DIR='data', IPYTHONDIR='ipython')
    env = os.environ | {k: str(folder/v) for k, v in own.items()} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    port = free_port()
    words = ['--no-browser', '--allow-root', '--expose-app-in-browser', f'--ServerApp.port={port}',
             '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}']
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *words], cwd=folder, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    until(lambda: answers(f'{address}/api') or server.poll() is not None, 'JupyterLab answers')
    assert server.poll() is None, (folder/'log').read_text()[-2000:]
    yield address, folder
    below = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    for process in psutil.wait_procs([psutil.Process(server.pid), *below], 30)[1]: process.kill()

@pytest.fixture(scope='module')
def chrome():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'window-size=1280,1000'):
        options.add_argument(f'--{flag}')
    options.binary_location = CHROME[0]
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROME[1]))
    yield chrome
    chrome.quit()

KERNEL = 'window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status'
RUN = "jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.allRun = true })"

@pytest.fixture(scope='module')
def page(chrome, lab):
    "The notebook in the browser, all of it run."
    chrome.get(f'{lab[0]}/doc/tree/tour.ipynb')
    until(lambda: chrome.execute_script(f"return {KERNEL} == 'idle'"), 'the kernel is idle')
    chrome.execute_script(RUN)
    until(lambda: chrome.execute_script('return window.allRun'), 'all cells run')
    return chrome

@pytest.fixture(scope='module')
def kernel(page, lab):
    "A second line to the notebook's kernel: what an expression is there."
    from jupyter_client import BlockingKernelClient
    client = BlockingKernelClient(connection_file=str(next((lab[1]/'runtime').glob('kernel-*.json'))))
    client.load_connection_file()
    client.start_channels()
    def ask(expression):
        reply = client.execute('', silent=True, user_expressions=dict(it=expression), reply=True, timeout=PATIENCE)
        return eval(reply['content']['user_expressions']['it']['data']['text/plain'])
    yield ask
    client.stop_channels()


def sources(page, pictures):
    "What the pictures are, all at one moment."
    return page.execute_script('return [...document.querySelectorAll(arguments[0])].map(p => p.src)', pictures)

def seconds(kernel): return kernel('__import__("time").process_time()')

def changes(page, kernel, pictures, act, which):
    "Do something, wait until one of the pictures is another, and say how long the kernel worked on it."
    before, worked = sources(page, pictures), seconds(kernel)
    assert before and all(before)
    act()
    def another(): return len(now := sources(page, pictures)) == len(before) and now[which] != before[which]
    until(another, 'another picture')
    return seconds(kernel) - worked


def test_all_cells_run_without_an_error(page):
    assert page.find_elements('css selector', '.jp-OutputArea-output img') # pictures
    assert [e.text for e in page.find_elements('css selector', '[data-mime-type="application/vnd.jupyter.error"]')] == []
    said = page.find_element('tag name', 'body').text
    assert 'interactive(' not in said and 'Warning: ' not in said

def test_a_slider_draws_another_picture(page, kernel):
    "Within a second of work for the kernel."
    from selenium.webdriver.common.keys import Keys
    slider = page.find_element('css selector', '.widget-inline-hbox .noUi-handle')
    page.execute_script('arguments[0].scrollIntoView({block: "center"})', slider)
    before = kernel('planner.children[0].value')
    drawn = '.widget-interact .jp-OutputArea-output img'
    took = changes(page, kernel, drawn, lambda: slider.send_keys(Keys.ARROW_RIGHT), 0)
    assert kernel('planner.children[0].value') == before + 1 and took < 1

def test_a_box_is_drawn_with_the_mouse(page, kernel, tmp_path):
    "Where the mouse went down and came up; the class becomes possible there, and both pictures change."
    from selenium.webdriver import ActionChains
    canvas = page.find_element('css selector', '.widget-image')
    page.execute_script('arguments[0].scrollIntoView({block: "center"})', canvas)
    side, zoom = canvas.size['width'], kernel('annotator.zoom')
    possible = '(annotator.annotation.class_sets(scan.shape, task.n_classes).possible > 1).sum().item()'
    marks, before = kernel('annotator.marks'), kernel(possible)
    def drag():
        hand = ActionChains(page, duration=100).move_to_element_with_offset(canvas, -side//2 + 50, -side//2 + 50)
        hand.click_and_hold().move_by_offset(40, 20).move_by_offset(40, 20).release().perform()
    took = changes(page, kernel, '.widget-image', drag, -1)
    c, *box = kernel('annotator.marks[-1]')
    assert len(kernel('annotator.marks')) == len(marks) + 1 and c == marks[0][0] and kernel(possible) > before
    assert all(abs(found - at/zoom) <= 1.5 for found, at in zip(box, (50, 50, 130, 90))), box
    assert took < 2 and page.save_screenshot(str(tmp_path/'box.png'))
