from typing import get_args, get_type_hints

from isheep_jax.config import Config, RespondConfig, SynthesizeConfig
from isheep_jax.loop.prompting.methods import RESPOND_METHODS, SYNTHESIZE_METHODS, templates_of


def test_every_method_of_the_config_has_an_entry():
    assert set(get_args(get_type_hints(SynthesizeConfig)["method"])) == SYNTHESIZE_METHODS.keys()
    assert set(get_args(get_type_hints(RespondConfig)["method"])) == RESPOND_METHODS.keys()


def test_a_template_of_both_methods_is_needed_once():
    config = Config(synthesize=SynthesizeConfig(method="retrieved"), respond=RespondConfig(method="retrieved"))
    assert templates_of(config) == ("retrieved",)
    assert templates_of(Config()) == ()
