"What is wrong with a built site: broken links, requests that leave it, pictures without words."
import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LOADED = {'script': 'src', 'img': 'src', 'iframe': 'src', 'source': 'src', 'link': 'href'}
LEFT_OVER = [(selector, re.compile(pattern, flags=re.M), what) for selector, pattern, what in (  # nobody should see
    ('pre', r'^\s*#\|', 'a directive'),
    ('.cell_output pre', r'interactive\(children=', 'a widget that is not there'),
    ('p, .cell_output pre', r'Traceback \(most recent call last\)', 'a traceback'),
    ('p', r'^\s*<(table|div|style|img)\b', 'HTML as text'),
    ('p', r'<!--', 'a mark'),
)]


@cache
def read(file): return BeautifulSoup(file.read_text(), 'html.parser')


@cache
def anchors(file): return {t['id'] for t in read(file).find_all(id=True)}


def broken(page, link):
    "Whether a link of a page leads nowhere inside the site."
    url = urlsplit(link)
    if url.scheme or url.netloc: return False
    there = (page.parent/unquote(url.path)).resolve() if url.path else page
    if not there.is_file(): return True
    return bool(url.fragment) and there.suffix == '.html' and unquote(url.fragment) not in anchors(there)


def outside(tag, attribute):
    "Whether the browser fetches something from elsewhere for a tag."
    fetched = tag.name != 'link' or {'stylesheet', 'icon', 'preload', 'shortcut'} & set(tag.get('rel', []))
    return bool(fetched) and bool(re.match(r'(https?:)?//', tag.get(attribute, '')))


def page_problems(page):
    "Problems of one page."
    html = read(page)
    for a in html.find_all('a', href=True):
        if broken(page, a['href']): yield f"a broken link, {a['href']}"
    for name, attribute in LOADED.items():
        yield from (f'{t[attribute]} is fetched from elsewhere' for t in html.find_all(name) if outside(t, attribute))
    for img in html.find_all('img'):
        if not img.get('alt', '').strip(): yield f"no words for {img['src']}"
        if broken(page, img['src']): yield f"no picture {img['src']}"
    if '_modules' in page.parts: return
    for selector, pattern, what in LEFT_OVER:
        yield from (f'{what}, {t.get_text()[:60]!r}' for t in html.select(selector) if pattern.search(t.get_text()))


def problems(folder):
    "Problems of all pages and style sheets."
    for page in sorted(folder.rglob('*.html')):
        yield from (f'{page.relative_to(folder)}: {p}' for p in page_problems(page))
    for sheet in folder.rglob('*.css'):
        if re.search(r'(url\(|@import)\s*["\']?(https?:)?//', sheet.read_text()):
            yield f'{sheet.relative_to(folder)}: fetches from elsewhere'


if __name__ == '__main__':
    found = list(problems(Path(sys.argv[1]).resolve()))
    sys.exit('\n'.join(found) if found else 0)
