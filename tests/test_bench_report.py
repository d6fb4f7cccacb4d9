"""The tables of benchmarks in docs/results.md are what their result files say."""

import re
import shutil

import pytest
from conftest import ROOT

from benchmarks.report import main

RESULTS = ROOT / "docs" / "results.md"
NAMES = re.findall(r"<!-- (bench_\w+): begin -->", RESULTS.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_page_holds_the_tables_of_its_result_files(tmp_path, monkeypatch, name):
    result, page = tmp_path / f"{name}.json", tmp_path / "page.md"
    shutil.copy(ROOT / "benchmarks" / "results" / result.name, result)
    page.write_text(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n")
    monkeypatch.setattr("sys.argv", ["report", str(result), "--write", str(page)])
    main()
    assert page.read_text().strip() in RESULTS.read_text()
    assert result.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("content", ["", "{}", '{"benchmarks": []}'])
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, monkeypatch, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit, match=r"^error: RESULT must .*$"):
        main()
