import threading

from pipelines import progress
from pipelines.curation import progress as curating
from pipelines.progress import Line, clock, polling, shown


def test_a_log_gets_one_line_a_stage_and_no_markup(capsys):
    with shown(lambda state: state) as show:
        show(Line(stage="list", title="listing sources"))
        for done in range(5):
            detail = f"[green]{done} kept[/]"
            finished = done == 4
            show(
                Line(
                    stage="work",
                    title="curating",
                    done=done,
                    total=4,
                    detail=detail,
                    finished=finished,
                )
            )
    assert capsys.readouterr().err.splitlines() == [
        "listing sources",
        "curating 0/4 0 kept",
        "curating 4/4 4 kept",
    ]


def test_a_stage_is_told_again_after_a_while(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with shown(lambda done: Line(stage="work", title="encoding", done=done, total=9)) as show:
        show(1)
        show(2)
    assert capsys.readouterr().err.splitlines() == ["encoding 1/9", "encoding 2/9"]


def test_curation_says_what_was_kept_and_how_long_it_takes(capsys):
    state = curating.Progress(
        stage="work",
        done=5,
        total=10,
        kept=3,
        rejected=1,
        failed=1,
        clips=4,
        video_seconds=7200,
        videos_per_hour=60,
        eta_seconds=3605,
    )
    with curating.progress_bar() as show:
        show(state)
    assert capsys.readouterr().err == (
        "curating 5/10 3 kept (4 clips) · 1 rejected · 1 failed · 2.0 h of video · 60/h"
        " · 1:00:05 left\n"
    )


def test_looks_go_on_while_the_work_does_and_once_after_it():
    looked = threading.Event()
    count = []

    def look():
        count.append(None)
        looked.set()

    with polling(look, "test"):
        assert looked.wait(5)
        before = len(count)
    assert len(count) > before


def test_a_clock_has_hours_only_where_there_are_any():
    assert (clock(65), clock(3605)) == ("1:05", "1:00:05")
