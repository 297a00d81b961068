"""Check a report of `python -m qwen3fast.bench report` in a real browser: by keyboard, by mouse, in both themes.

python tools/check_report.py report.html --browser /usr/bin/chromium --pictures FOLDER

Needs `pip install playwright` and a Chromium. Prints each check; the exit status is 1 at the first that fails.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

SIZES = {"desktop": (1400, 900), "phone": (390, 844)}


def expect(is_so: bool, what: str) -> None:
    """Print a check's outcome. Raises: SystemExit if it failed."""
    print(f"{'ok' if is_so else 'FAILED'}: {what}")
    if not is_so:
        raise SystemExit(1)


def check_loading(browser: Browser, url: str, pictures: Path | None) -> None:
    """Check that the page loads without errors and other requests, and does not scroll sideways, in both themes."""
    for name, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            errors: list[str] = []
            requests: list[str] = []
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(url)
            expect(not errors and requests == [url], f"{name}, {scheme}: no errors, no other requests {errors}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            expect(wide <= width, f"{name}, {scheme}: the page is as wide as the window")
            if pictures:
                pictures.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=pictures / f"{name}-{scheme}.png", full_page=True)
            page.close()


def check_keyboard(page: Page) -> None:
    """Check that Tab reaches links and points, arrow keys move between points, Enter sorts, Space hides a series."""
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(e => e.getAttribute('class') || e.tagName)(document.activeElement)"))
        if seen[-1] == "point":
            break
    expect("skip" in seen and "A" in seen and seen[-1] == "point", "Tab goes from the skip link to a point")
    expect(page.locator("#tip").is_visible(), "a focused point shows its value")
    words = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip").inner_text() != words, f"an arrow key shows the next one, not: {words}")
    page.keyboard.press("Escape")
    expect(page.locator("#tip").is_hidden(), "Escape hides it")

    header = page.locator("thead th").filter(has_text="tok/s").first
    body = header.locator("xpath=ancestor::table").locator("tbody")
    column = header.evaluate("e => e.cellIndex")
    header.locator("button").focus()
    for order, sign in (("ascending", 1), ("descending", -1)):
        page.keyboard.press("Enter")
        orders = body.evaluate(f"b => [...b.rows].map(r => r.cells[{column}].dataset.order).filter(t => t).map(Number)")
        is_sorted = orders == sorted(orders, key=lambda value: sign * value)
        expect(header.get_attribute("aria-sort") == order and is_sorted, f"Enter sorts a column: {order}")

    button = page.locator(".series button").first
    figure = button.locator("xpath=ancestor::figure")
    parts = figure.locator("[data-series='0']")
    button.focus()
    page.keyboard.press("Space")
    is_hidden = all(not part.is_visible() for part in parts.all())
    expect(is_hidden and button.get_attribute("aria-pressed") == "false", "Space hides a series")
    page.keyboard.press("Space")
    expect(parts.first.is_visible(), "and shows it again")


def check_mouse(page: Page) -> None:
    """Check that hovering shows a value, and that the theme can be changed."""
    page.locator(".point").first.hover()
    expect(page.locator("#tip").is_visible(), "hovering over a point shows its value")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    expect(page.evaluate("getComputedStyle(document.body).backgroundColor") != before, "the button changes the theme")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--browser", help="the Chromium to run [playwright's own]")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    args = parser.parse_args()
    url = args.report.resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        check_loading(browser, url, args.pictures)
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light", reduced_motion="reduce")
        page.goto(url)
        check_keyboard(page)
        check_mouse(page)
        browser.close()


if __name__ == "__main__":
    main()
