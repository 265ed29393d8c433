"""The report of a run: a page that stands alone, tells what was asked, and breaks on no text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

TEXT = "Is <script>alert('1')</script> & \"line\" thick?"
LOADING = {"src", "href", "srcset", "action", "data", "poster", "background"}
EMPTY = {"meta", "img", "polyline", "circle", "line"}


class Page(HTMLParser):
    """Everything of a page that matters here; fails on a tag that is closed in the wrong place."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.words, self.loaded, self.open = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in LOADING]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def told(lab):
    """Reports of runs with a tiny SD3 and two questions; a function of the settings and the number of judges."""
    from dual_process.trainers.dual_process import Settings, train
    from dual_process.trainers.looks import Looks
    from dual_process.trainers.lora_metadata import metadata
    from dual_process.trainers.objective import Objective
    from dual_process.trainers.report import Report
    from dual_process.vlm.question import Question

    def report(second=False, asked=(), unseen=False, **settings):
        student, judge = lab.build_student("SD3"), lab.build_judge()
        judge.judge.name = "judge <1>"
        asked = [Question(TEXT), Question("Is it night?", "No", weight=2.5, keep=True), *asked]
        goal = Objective(asked)
        settings = Settings(**{"steps": 3, "check_every": 1, "check_seeds": 2, "stop_at": 1.1, **settings})
        other = judge.judge if second else None

        def loop():
            run = train(student, judge.judge, goal, settings, lambda *_: None, other)
            run.unseen = Looks(student, judge.judge, other, goal, settings, run).unseen() if unseen else None
            return run

        run = student.run(loop, [judge.patcher])
        names = [judge.judge.name, "second & judge"] if second else [judge.judge.name]
        return run, Report(run, metadata(run, goal, settings, names, student, ["a <b>line</b>", "night"]))

    return report


def test_going_back_is_told(told):
    run, report = told(steps=2, learning_rate=1.0, drift_limit=1e-9)
    assert run.retreats == len(run.rate_falls) == 1 and run.rate_falls[0].startswith("at step 1 pictures got")
    assert report.outcome().startswith(f"2 steps: {run.rate_falls[0]}; {run.stopped}.")


def test_the_page_is_whole_loads_nothing_and_tells_what_happened(told):
    from dual_process.trainers.report import page

    run, report = told(second=True)
    read = Page(page(report))
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert read.loaded and all(value.startswith("data:image/jpeg;base64,") for value in read.loaded)
    assert "url(" not in page(report) and "@import" not in page(report)
    assert read.tags.count("img") == 2 * len(run.checks[0].pictures)
    told_of = (TEXT, "Is it night?", "keep", "2.5", "judge <1>", "second & judge", run.stopped, "learning_rate")
    for words in (*told_of, "a <b>line</b>; night"):
        assert words in read.text, words
    for judge in (run.checks[0].scores, run.checks[-1].scores, run.checks[0].second, run.checks[-1].second):
        assert f"{judge[1]:.1%}" in read.text
    assert f"seed {2**31}, prompt 1" in read.text and f"seed {2**31 + 1}, prompt 1" in read.text
    assert read.tags.count("circle") == 2 * 2 * 4, "two judges, two questions, looks at steps 0 to 3"


def test_what_is_only_watched_is_told_but_is_not_what_was_taught(told):
    from dual_process.trainers.report import page
    from dual_process.vlm.question import Question

    run, report = told(asked=[Question("Is there a sun?", weight=0.0)])
    read = Page(page(report))
    assert report.title == f"{TEXT} Yes" == report.header["modelspec.title"]
    for words in ("Is there a sun?", "watch", f"{run.checks[-1].scores[2]:.1%}"):
        assert words in read.text, words


def test_what_nothing_was_chosen_by_is_told(told):
    from dual_process.trainers.report import page

    run, report = told(second=True)
    assert report.story["unseen"] == [] and run.proved() == ""
    run, report = told(second=True, unseen=True)
    before, after = report.story["unseen"]
    assert before["pictures"] == after["pictures"] == 2 and before["scores"] != run.checks[0].scores
    assert run.proved().startswith("2 unseen pictures: ") and run.proved() in Page(page(report)).text


def test_one_judge_and_a_run_without_a_step(told):
    from dual_process.trainers.report import page, sheet

    run, report = told(stop_at=0.0)
    read = Page(page(report))
    assert run.loss == [] and "Nothing was trained" in read.text and "held before the first step" in read.text
    assert "never trained against" not in read.text and read.tags.count("circle") == 2
    assert sheet(report).width > 700


def test_what_changed_is_said_in_plain_words(told):
    from dual_process.trainers.report import Report, page

    run, report = told()
    quiet = {"luminance": 0.0, "saturation": -0.18, "edge_density": 0.1, "colour_entropy": 0.0, "diversity": 0.4}
    run.checks[-1].changes.update({**quiet, "clipped": -0.3})
    text = Page(page(Report(run, report.header))).text
    assert text.count("18% greyer") == 3 and "busier" not in text and "more different" not in text


def test_how_dirty_pictures_look_to_the_model_itself_is_told(told):
    from dual_process.trainers.report import Report, page

    run, report = told()
    strangeness = report.story["held_out_pictures_changed"]["strangeness"]
    assert strangeness == run.checks[-1].changes["strangeness"] > 0
    assert f"look {strangeness:.1f} times as dirty as its own (by what" in Page(page(report)).text
    run.checks[-1].changes["strangeness"] = 11.2
    text = Page(page(Report(run, report.header))).text
    assert text.count("look 11.2 times as dirty") == 3


def test_pictures_between_are_not_kept(told):
    run, report = told(check_seeds=2)
    assert len(report.checks) == 4 and all(check.pictures is None for check in report.checks)
    assert torch.equal(torch.stack([after for _, after in report.pairs()]), run.checks[-1].pictures)


def test_the_node_writes_page_and_sheet_side_by_side_and_never_over_others(told):
    import folder_paths
    from comfy_api.latest import io

    from dual_process.nodes.report import RunReport
    from dual_process.trainers.report import page, sheet

    _, report = told()
    hidden = {io.Hidden.prompt: {"1": {}}, io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}}}
    hidden["hidden_inputs"] = dict(hidden)  # newer ComfyUIs look there
    outputs = [RunReport.PREPARE_CLASS_CLONE(hidden).EXECUTE_NORMALIZED(report, "sub/tale") for _ in range(2)]
    paths = [Path(output.result[0]) for output in outputs]
    assert [path.name for path in paths] == ["tale_00001_.html", "tale_00002_.html"]
    assert paths[0].parent == Path(folder_paths.get_output_directory()) / "sub"
    assert paths[0].read_text(encoding="utf-8") == page(report)
    told_in_numbers = json.loads(paths[0].with_suffix(".json").read_text(encoding="utf-8"))
    assert told_in_numbers["story"] == report.story and told_in_numbers["loss"] == report.loss
    assert [check["scores"] for check in told_in_numbers["checks"]] == [check.scores for check in report.checks]
    picture = Image.open(paths[0].with_suffix(".png"))
    assert picture.size == sheet(report).size
    shown = outputs[0].ui
    assert shown["images"][0]["filename"] == "tale_00001_.png" and str(paths[0]) in shown["text"][0]
    for prefix in ("", "../outside"):
        with pytest.raises(ValueError, match="is not a file name inside"):
            RunReport.execute(report, prefix)
        assert "is not a file name inside" in RunReport.validate_inputs(prefix)
    assert json.loads(picture.text["workflow"]) == {"nodes": []}, "the workflow is in the picture"
