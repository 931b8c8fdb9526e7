"""What is changed in vLLM: records in `table`, applied by `apply`.

In: vLLM's own methods. Out: what runs in their place, one module for each subject. `engine_start`,
`adapter_loading` (with `refusals` and `load_report`) and `fully_sharded` are the plugin's own work;
`expert_parallel`, `punica`, `activations` and `warm_up` fix faults of vLLM releases.
Read `table` first.
"""
