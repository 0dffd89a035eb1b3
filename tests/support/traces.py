"""What attaching streams may leave on a backbone."""


def traces(model):
    """Everything that attaching streams may leave on a backbone."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "attributes": sorted(vars(model)),
        "decoder attributes": sorted(vars(model.base_model)),
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "training": [module.training for module in model.modules()],
        "forwards": [vars(module).get("forward") for module in model.modules()],
    }
