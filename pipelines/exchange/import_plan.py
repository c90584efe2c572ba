"""What an import will do, fixed before it starts: settings, models, clips, and shards of them."""

from dataclasses import dataclass
from pathlib import Path

from pipelines import schema
from pipelines.exchange.frame_folder import ExchangeError
from pipelines.exchange.import_config import ImportConfig
from pipelines.exchange.scan import ImportItem
from pipelines.overrides import config_hash, differences, from_dict, to_dict
from pipelines.shards import write_atomic

PLAN_FILE = "import.json"
_FORMAT = 1
_MAX_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """A whole import, before it starts."""

    layout: str
    config: ImportConfig
    models: dict[str, str]
    items: tuple[ImportItem, ...]
    format: int = _FORMAT

    @property
    def config_hash(self) -> str:
        """Of all that decides what the shards hold, the items apart."""
        # The zero keeps the hashes of folders that were begun when it stood for the time limit.
        settings = self.config.outcome() | {"timeout_seconds": 0}
        return config_hash([self.layout, settings, self.models, self.format])


def load_plan(folder: Path) -> ImportPlan:
    """The plan of an import's folder. Raises ExchangeError where there is none."""
    path = folder / PLAN_FILE
    try:
        return from_dict(ImportPlan, schema.decode_json(path.read_bytes(), str(path)))
    except OSError:
        raise ExchangeError(f"{folder} holds no {PLAN_FILE}: nothing was imported there.") from None
    except ValueError as error:
        raise ExchangeError(f"{path} cannot be read: {error}") from None


def save_plan(folder: Path, plan: ImportPlan) -> None:
    """Write the plan into the folder, or check that the folder's own is the same."""
    path = folder / PLAN_FILE
    if path.exists():
        lines = _changes(load_plan(folder), plan)
        if lines:
            more = f"\n  and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
            raise ExchangeError(
                f"{folder} was begun with other settings or clips:\n  "
                + "\n  ".join(lines[:_MAX_LISTED])
                + f"{more}\nGive the same ones to go on with it, or another --out folder."
            )
        return
    if any(folder.glob("shard-*")) or (folder / "plan.json").exists():
        raise ExchangeError(
            f"{folder} holds shards of another run: give an --out folder of its own."
        )
    write_atomic(path, schema.encode_json(plan, digits=17))


def _changes(before: ImportPlan, after: ImportPlan) -> list[str]:
    lines = differences({"layout": before.layout}, {"layout": after.layout})
    lines += differences(before.config.outcome(), after.config.outcome())
    lines += differences(before.models, after.models, "models")
    old = {item.uri: item for item in before.items}
    new = {item.uri: item for item in after.items}
    lines += [f"no longer there: {uri}" for uri in sorted(old.keys() - new.keys())]
    lines += [f"new: {uri}" for uri in sorted(new.keys() - old.keys())]
    for uri in sorted(old.keys() & new.keys()):
        lines += differences(to_dict(old[uri]), to_dict(new[uri]), uri)
    return lines


def parts(plan: ImportPlan) -> dict[str, tuple[ImportItem, ...]]:
    """The items of each shard by its name."""
    size = plan.config.clips_per_shard
    return {
        schema.shard_name(number): plan.items[start : start + size]
        for number, start in enumerate(range(0, len(plan.items), size))
    }
