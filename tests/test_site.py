"The site: its pages, and how a browser shows them. Built once, a few pages whole, headings of the rest."
import functools, http.server, importlib.util, re, shutil, sys, threading
from pathlib import Path

import pytest

from conftest import ROOT, call

WHOLE = ['index', '00_classsets', '15_supervision', '29_widgets', '40_results', 'howto/planner', 'api/mlds.task']
NEEDED = ['sphinx', 'myst_nb', 'furo', 'sphinxcontrib.bibtex', 'selenium', 'bs4']
CHROME = [shutil.which('chromium'), shutil.which('chromedriver')]


def missing(name):
    try: return importlib.util.find_spec(name) is None
    except ModuleNotFoundError: return True

pytestmark = pytest.mark.skipif(any(map(missing, NEEDED)), reason='needs `pip install .[docs]`')
browser = pytest.mark.skipif(not all(CHROME), reason='needs Chromium and its driver, see CONTRIBUTING')


@pytest.fixture(scope='module')
def check():
    spec = importlib.util.spec_from_file_location('check', ROOT/'.ci/site/check.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def site(checkout, tmp_path_factory):
    "The folder of the built site."
    out = tmp_path_factory.mktemp('site')/'html'
    built = ROOT/'build'/'mathjax-3.2.2'
    if built.exists(): shutil.copytree(built, checkout/'build'/built.name)
    done = call(sys.executable, '.ci/site/build.py', out, *WHOLE, cwd=checkout, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out

@pytest.fixture(scope='module')
def address(site):
    "The site behind a server of this machine."
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture(scope='module')
def chrome():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    flags = ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage')
    for flag in flags: options.add_argument(f'--{flag}')
    options.binary_location = CHROME[0]
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROME[1]))
    yield driver
    driver.quit()


def test_nothing_is_broken_or_fetched_from_elsewhere(site, check): assert list(check.problems(site)) == []

def test_a_problem_of_every_kind_is_found(tmp_path, check):
    (tmp_path/'a.html').write_text("""<p id="here">Traceback (most recent call last)</p><pre>#| hide</pre>
        <a href="b.html">b</a><a href="#there">c</a><a href="#here">d</a><a href="https://arxiv.org">e</a>
        <img src="a.html"><script src="//cdn.org/x.js"></script><link rel="stylesheet" href="http://f.org/a.css">""")
    (tmp_path/'a.css').write_text('@import "https://fonts.org/x.css";')
    found = '\n'.join(check.problems(tmp_path))
    wanted = ['a traceback', 'a directive', 'link, b.html', 'link, #there', 'no words', '//cdn.org', 'http://f.org',
              'a.css: fetches']
    assert len(found.splitlines()) == len(wanted) and all(w in found for w in wanted)

def test_pages_hide_what_is_hidden_and_show_the_rest(site):
    text = (site/'00_classsets.html').read_text()
    assert 'encode' in text and 'default_exp' not in text and 'class="output' in text
    assert {p.stem for p in site.glob('[0-9]*.html')} == {p.stem for p in (ROOT/'nbs').glob('[0-9]*.ipynb')}

def test_the_reference_has_the_comments_of_arguments(site):
    said = re.findall(r'^    \w+:.* # ([\w ]+)', (ROOT/'mlds/task.py').read_text(), flags=re.M)
    text = re.sub(r'<[^>]+>|\s+', ' ', (site/'api/mlds.task.html').read_text())
    assert len(said) > 2 and all(s.strip() in text for s in said) and '[source]' in text

def test_works_that_are_named_are_in_the_bibliography():
    bib = (ROOT/'nbs/references.bib').read_text()
    texts = [p.read_text() for p in (ROOT/'nbs').rglob('*.ipynb')]
    named = {n for t in texts for n in re.findall(r'([A-Z][^\W\d_]+(?:-[A-Z]\w+)?) et al\.', t)} - {'Reiss'}
    assert len(named) > 30 and sorted(n for n in named if n not in bib) == []


def errors(chrome): return [l['message'] for l in chrome.get_log('browser') if l['level'] == 'SEVERE']

def resize(chrome, width, dark=False):
    screen = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    chrome.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
    chrome.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[scheme]))

@browser
@pytest.mark.parametrize('width', [1280, 390])
def test_pages_fit_the_window_and_fetch_nothing(chrome, address, width, tmp_path):
    resize(chrome, width)
    for page in WHOLE:
        chrome.get(f'{address}/{page}.html')
        assert chrome.execute_script('return document.documentElement.scrollWidth') <= width, page
        fetched = chrome.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert fetched and all(f.startswith((address, 'data:')) for f in fetched), page
        assert chrome.save_screenshot(str(tmp_path/'page.png')) and (tmp_path/'page.png').stat().st_size > 10_000
    assert errors(chrome) == []

@browser
def test_formulas_are_set(chrome, address, site):
    if not (site/'_static/mathjax').exists(): pytest.skip('needs MathJax, which `make docs` fetches with npm')
    from selenium.webdriver.support.ui import WebDriverWait
    chrome.get(f'{address}/15_supervision.html')
    WebDriverWait(chrome, 20).until(lambda c: c.find_elements('css selector', 'mjx-container svg'))

@browser
def test_dark_where_the_reader_wants_it(chrome, address):
    def brightness():
        chrome.get(f'{address}/index.html')
        colour = chrome.find_element('tag name', 'body').value_of_css_property('background-color')
        return sum(map(int, re.findall(r'\d+', colour)[:3]))/3
    resize(chrome, 1280, dark=True)
    assert brightness() < 60
    resize(chrome, 1280)
    assert brightness() > 200

@browser
@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_search_finds_a_chapter(chrome, address, site, scheme):
    from selenium.webdriver.support.ui import WebDriverWait
    start = address if scheme == 'http' else site.as_uri()
    chrome.get(f'{start}/search.html?q=interval+of+class+sets')
    def hits(c): return [a.get_attribute('href') for a in c.find_elements('css selector', '#search-results li a')]
    WebDriverWait(chrome, 20).until(lambda c: any('00_classsets' in h for h in hits(c)))
    assert errors(chrome) == []
