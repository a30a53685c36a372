"""Loading of plugins: what is offered, what breaks, and what the user is told."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError
from gsa_platform.registry import Registry

BROKEN = "raise ImportError('no libacme here')\n"


def load(site: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> Registry:
    monkeypatch.syspath_prepend(site)
    for module in site.glob("*.py"):
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
    registry = Registry(environ)
    registry.load_entry_points(importlib.metadata.distributions(path=[str(site)]))
    return registry


def test_first_party_components_come_through_entry_points():
    registry = Registry({})
    registry.load_entry_points()
    assert {"dense", "gsa"} <= set(registry.names("attention"))
    for slot in ("indexer", "sparsity", "gate", "objective"):
        assert registry.build(slot, {"name": "none"}, None) is None
    assert registry.entry("attention", "gsa").plugin.distribution == "gsa-platform"
    assert not registry.conflicts


def test_build_types_the_settings(plugin, monkeypatch):
    registry = load(plugin("acme"), monkeypatch)
    built = registry.build("attention", {"name": "acme", "top_k": "7"}, "dims")
    assert (built.config.top_k, built.dims) == (7, "dims")
    with pytest.raises(UserError, match="top_k"):
        registry.build("attention", {"name": "acme", "top_k": "many"}, None)
    with pytest.raises(UserError, match="topk"):
        registry.build("attention", {"name": "acme", "topk": 1}, None)


def test_target_is_imported_only_when_built(plugin, monkeypatch):
    source = """
    from dataclasses import dataclass
    from gsa_platform import Component, hookimpl

    @dataclass
    class Config:
        name: str = "lazy"

    @hookimpl
    def gsa_register_gate():
        return [Component("lazy", "absent_module:Gate", Config)]
    """
    registry = load(plugin("lazy", source), monkeypatch)
    assert registry.names("gate") == ["lazy"]
    with pytest.raises(UserError, match=r"plugin 'lazy'.*absent_module:Gate"):
        registry.build("gate", {"name": "lazy"}, None)


def test_broken_plugin_is_quoted_and_does_not_stop_others(plugin, monkeypatch):
    plugin("broken_one", BROKEN)
    registry = load(plugin("acme"), monkeypatch)
    assert registry.names("attention") == ["acme"]
    with pytest.raises(UserError, match=r"broken_one-dist offers it.*no libacme here"):
        registry.component("attention", "broken_one")
    with pytest.raises(UserError, match=r"may offer it.*no libacme here"):
        registry.component("attention", "elsewhere")


def test_strict_raises(plugin, monkeypatch):
    site = plugin("broken_one", BROKEN)
    with pytest.raises(UserError, match=r"broken_one.*no libacme here"):
        load(site, monkeypatch, GSA_STRICT_PLUGINS="1")


def test_a_failing_hook_leaves_nothing_behind(plugin, monkeypatch):
    source = """
    from gsa_platform import hookimpl

    @hookimpl
    def gsa_register_gate():
        raise RuntimeError("hook went wrong")

    @hookimpl
    def gsa_validate(config):
        raise RuntimeError("must not be called")
    """
    registry = load(plugin("half", source), monkeypatch)
    assert registry.plugins[0].status == "broken"
    assert "hook went wrong" in registry.plugins[0].reason
    assert registry.manager.hook.gsa_validate.get_hookimpls() == []


def test_duplicate_component_names_both_owners(plugin, monkeypatch):
    plugin("first", name="same")
    registry = load(plugin("second", name="same"), monkeypatch)
    with pytest.raises(UserError) as caught:
        registry.require_no_conflicts()
    for part in ("attention=same", "first-dist", "second-dist", "GSA_DISABLE_PLUGINS="):
        assert part in str(caught.value)
    load(
        plugin("third", name="other"), monkeypatch, GSA_DISABLE_PLUGINS="first"
    ).require_no_conflicts()


def test_disabled_plugin_is_listed_and_named(plugin, monkeypatch):
    registry = load(plugin("acme"), monkeypatch, GSA_DISABLE_PLUGINS="x, acme")
    assert [p.status for p in registry.plugins] == ["disabled"]
    with pytest.raises(UserError, match="'acme' is turned off by GSA_DISABLE_PLUGINS"):
        registry.component("attention", "acme")


@pytest.mark.parametrize("version", ["(2, 0)", "(1, 99)", "'1.0'"])
def test_wrong_api_version(plugin, monkeypatch, version):
    registry = load(plugin("future", f"GSA_PLUGIN_API = {version}\n"), monkeypatch)
    assert registry.plugins[0].status == "broken"
    assert "API" in registry.plugins[0].reason


def test_unknown_hook_warns_with_a_suggestion(plugin, monkeypatch):
    source = """
    from gsa_platform import hookimpl

    @hookimpl
    def gsa_register_attentions():
        return []
    """
    site = plugin("typo", source)
    [found] = load(site, monkeypatch).plugins
    assert found.status == "ok"
    assert "Did you mean 'gsa_register_attention'?" in found.warnings[0]
    with pytest.raises(UserError, match="gsa_register_attentions"):
        load(site, monkeypatch, GSA_STRICT_PLUGINS="1")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("'acme'", "must return Component records"),
        ("Component('other', 'm:C', Config)", "needs a field  name"),
        ("Component('acme', 'no colon', Config)", "package.module:Class"),
        ("Component('acme', 'm:C', int)", "must be a dataclass"),
    ],
)
def test_malformed_records_are_refused(plugin, monkeypatch, returned, message):
    source = f"""
    from dataclasses import dataclass
    from gsa_platform import Component, hookimpl

    @dataclass
    class Config:
        name: str = "acme"

    @hookimpl
    def gsa_register_gate():
        return {returned}
    """
    [found] = load(plugin("acme", source), monkeypatch).plugins
    assert found.status == "broken" and message in found.reason


def test_missing_needs_make_a_component_unavailable(plugin, monkeypatch):
    source = """
    from dataclasses import dataclass
    from gsa_platform import Capabilities, Component, hookimpl

    @dataclass
    class Config:
        name: str = "needy"

    @hookimpl
    def gsa_register_gate():
        return Component("needy", "m:C", Config, "", Capabilities(needs=("pluggy", "no-such")))
    """
    registry = load(plugin("needy", source), monkeypatch)
    assert registry.entry("gate", "needy").unavailable() == "needs no-such (pip install no-such)"
    with pytest.raises(UserError, match="needs no-such"):
        registry.build("gate", {"name": "needy"}, None)


def test_one_off_file(plugin, tmp_path, monkeypatch):
    site = plugin("one_off")
    registry = Registry({})
    registry.load_path(site / "one_off.py")
    assert registry.names("attention") == ["one_off"]
    assert registry.build("attention", {"name": "one_off"}, None).config.top_k == 64
    monkeypatch.delitem(sys.modules, "one_off")
    with pytest.raises(UserError, match=r"absent\.py[\s\S]*plugins_path="):
        registry.load_path(tmp_path / "absent.py")


def test_one_off_file_may_not_shadow_a_module(tmp_path):
    (tmp_path / "json.py").write_text("")
    registry = Registry({})
    registry.load_path(tmp_path / "json.py")
    assert registry.plugins[0].status == "broken" and "taken" in registry.plugins[0].reason


def test_unknown_slot_and_name_list_choices():
    registry = Registry({})
    registry.load_entry_points()
    with pytest.raises(UserError, match=r"Did you mean 'gsa'[\s\S]*dense"):
        registry.component("attention", "gsaa")
    with pytest.raises(UserError, match=SLOTS[0]):
        registry.component("attentoin", "gsa")
