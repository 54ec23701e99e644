"""SGLang's DeepEP path on a machine without a GPU: a stand-in for `deep_ep`, hooks and a launcher.

The modules: `deep_ep_buffer` the communication buffer over `torch.distributed`; `experts` the
reference expert computation; `hooks` the plugin entry point that lifts what stands in SGLang's way;
`launch` the environment and the flags of a server; `site/` the folder put first on PYTHONPATH.
Nothing here is active unless `sglang_moelb.environment.standin_requested()` says so.
"""
