"""Other trainers' names of flags and keys, each with a sentence that says what to write here instead.

The names are those of LLaMA2-Accessory's other entries, artidoro's qlora, peft, transformers' Trainer and TRL, Axolotl,
LLaMA-Factory, torchtune and LitGPT. A name may have several sentences, since training and the demo have different
flags: the first one counts that names only flags of the entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from accessory.errors import nearest

_SENTENCES = (
    # LoRA, and what else is trained
    ("r lora_rank lora_dim rank adapter_rank",
     'LoRA\'s rank is --lora_r, or "lora_rank" in a JSON file of --llama_config'),
    ("r lora_r lora_rank lora_dim rank adapter_rank", 'LoRA\'s rank is "lora_rank" in a JSON file of --llama_config'),
    ("lora_scaling", "LoRA is scaled by --lora_alpha / --lora_r"),
    ("alpha",
     'it is --lora_alpha, or "lora_alpha" in a JSON file of --llama_config: LoRA is scaled by it / the rank'),
    ("alpha lora_alpha",
     'it is "lora_alpha" in a JSON file of --llama_config: LoRA is scaled by lora_alpha / lora_rank'),
    ("lora_dropout", 'it is "lora_dropout" in a JSON file of --llama_config'),
    ("target_modules lora_target lora_targets lora_target_modules lora_modules lora_attn_modules "
     "lora_target_linear "
     "apply_lora_to_mlp lora_attn_query lora_attn_key lora_attn_value lora_attn_proj lora_attn_mlp "
     "lora_query lora_key lora_value lora_projection lora_mlp",
     'LoRA\'s linears are "lora_targets" in a JSON file of --llama_config: wq, wk, wv, wo (q_proj, k_proj, v_proj, '
     "o_proj), w1, w2, w3 (gate_proj, down_proj, up_proj); absent: all"),
    ("layers_to_transform peft_layers_to_transform lora_layers_to_transform lora_layer_ids",
     'LoRA\'s blocks are "lora_layers" in a JSON file of --llama_config, such as "0-7,20"; absent: all'),
    ("modules_to_save lora_modules_to_save additional_target train_embeddings apply_lora_to_output lora_head "
     "train_head",
     'embedding and head are trained by "vocabulary_tuning": true in a JSON file of --llama_config'),
    ("bias lora_bias train_bias", 'biases are trained by "bias_tuning": true in a JSON file of --llama_config'),
    ("train_norm norm_modules", 'norms are trained by "norm_tuning": true in a JSON file of --llama_config'),
    ("use_rslora rslora peft_use_rslora",
     'rslora scales by alpha / root of the rank: give "lora_alpha" as alpha x root of the rank'),
    ("use_dora dora lora_use_dora peft_use_dora use_pissa pissa_init loraplus_lr_ratio use_galore galore_rank "
     "layers_pattern rank_pattern alpha_pattern fan_in_fan_out lora_fan_in_fan_out init_lora_weights loftq_config",
     "there is nothing of the kind here: leave it out"),
    ("adapter finetuning_type peft_type task_type full_finetune use_lora use_peft lora freeze train_type "
     "tuner_type",
     "the end of --llama_type says what is trained (_peft: norms and biases, or LoRA alone with --lora_r)"),
    # model, tokenizer, data
    ("vision_tower mm_vision_tower vision_model vision_encoder image_encoder clip_path qformer_path",
     "it is --vision_path, a Hugging Face directory of BLIP-2 or CLIP"),
    ("image images image_path image_file",
     "the demos for text take none: use multi_model_cli.py, single_turn_mm.py or multi_turn_mm.py in their place"),
    ("image_folder image_root image_dir media_dir",
     "it is `root` of an entry in a YAML of --data_config; absent: the data file's directory"),
    ("model base_model model_name model_name_or_path base_model_name_or_path model_path model_id model_id_or_path "
     "checkpoint checkpoint_path checkpoint_dir ckpt_dir ckpt_path pretrain_ckpt_file "
     "load path",
     "--pretrained_path takes the model's directory or file"),
    ("lora_weight_path adapter_name_or_path adapter_path lora_path lora_model_dir lora_model_path "
     "lora_model_name_or_path peft_model "
     "lora_weights adapters",
     "--pretrained_path takes the base first, then the trained parts"),
    ("tokenizer tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer_dir",
     "--tokenizer_path takes the tokenizer's file or directory; absent: what lies in the base"),
    ("special_tokens tokens add_tokens new_special_tokens additional_special_tokens",
     "--new_tokens adds to the vocabulary"),
    ("data dataset datasets data_path data_file data_files dataset_dir dataset_name dataset_path train_file "
     "train_data train_datasources train_dataset data_meta_path data_root",
     "--data_config takes a data file, a directory, a name such as alpaca, or a YAML that lists some"),
    ("dataset_format data_format formatting", "it is shape of an entry in the YAML of --data_config; absent: told"),
    ("template chat_template prompt_template prompt_style prompt_format instruction_template "
     "conversation_template prompt_type",
     "it is prompt_type of an entry in the YAML of --data_config"),
    ("max_train_samples max_samples num_samples", "ratio of an entry in the YAML of --data_config is the share to use"),
    ("train_on_inputs train_on_input train_on_prompt mask_prompt completion_only_loss assistant_only_loss",
     "only answers are learned; --train_on_source learns questions, too"),
    ("completion_loss_weight prompt_weight",
     "answers weigh 1 in the loss and prompts --prompt_loss_weight, 0 by default"),
    ("packed_data packing packed sample_packing pad_to_sequence_len multipack_sampler",
     "documents are packed end to end and never padded here: leave it out"),
    ("max_length max_seq_length max_seq_len seq_len seq_length sequence_len cutoff_len model_max_length block_size",
     "--max_words is a document's greatest length in tokens"),
    ("max_source_length", "--source_max_len is a question's greatest length in tokens"),
    ("max_target_length", "--target_max_len is an answer's greatest length in tokens"),
    ("max_length max_seq_length seq_len sequence_len cutoff_len model_max_length",
     "--max_seq_len is the greatest length of question and answer together, in tokens"),
    ("multi_turn conversation conversations", "--dialog trains on conversations"),
    # a step
    ("per_device_train_batch_size per_gpu_train_batch_size micro_batch_size train_batch_size per_device_batch_size",
     "--batch_size is the number of documents in a micro-batch of a data-parallel rank"),
    ("global_batch_size total_batch_size effective_batch_size",
     "a step has --batch_size x --accum_iter x data-parallel ranks documents"),
    ("gradient_accum_steps gradient_accumulation_steps gradient_accumulation gradient_accumulation_iters "
     "grad_accum "
     "accumulate_grad_batches",
     "--accum_iter is the number of micro-batches in a step"),
    ("teacher_model teacher_model_name teacher_model_name_or_path teacher_path teacher_checkpoint teacher_name_or_path",
     "--teacher takes the model that teaches, or base"),
    ("kd_alpha kd_ratio kd_weight distill_alpha distillation_alpha distillation_weight alpha_kd",
     "--teacher_weight is the divergence's share of the loss; the rest, cross-entropy's, has no flag of its own"),
    ("kd_temperature distill_temperature distillation_temperature kd_temp", "--teacher_temperature is the temperature"),
    ("kd_ce_alpha ce_weight", "cross-entropy counts what --teacher_weight leaves of 1"),
    ("learning_rate base_lr max_lr", "--lr is the highest learning rate"),
    ("init_lr", "the warm-up starts at 0: leave it out"),
    ("min_learning_rate lr_min min_lr_ratio min_lr_rate cosine_min_lr_ratio", "--min_lr is the rate at the end"),
    ("lr_scheduler lr_scheduler_type lr_scheduler_kwargs lr_decay_style lr_decay_iters cosine_constant_lr_ratio",
     "--lr_schedule takes cosine or constant; either follows --warmup_epochs"),
    ("warmup_ratio warmup_steps warmup_iters num_warmup_steps lr_warmup_steps lr_warmup_iters",
     "--warmup_epochs is the warm-up, in (fractional) epochs"),
    ("num_train_epochs num_epochs max_epochs n_epochs train_epochs", "--epochs is the number of passes over the data"),
    ("max_train_steps max_iters max_steps_per_epoch total_steps train_steps total_iters iterations",
     "--max_steps ends the run after so many steps"),
    ("max_grad_norm max_norm grad_clip gradient_clipping gradient_clip_val clip_grad_norm grad_clip_norm",
     "--clip_grad is what the gradient's norm is clipped to"),
    ("optimizer optimizer_type adam8bit", "--optim takes adamw, adamw8bit or paged_adamw"),
    ("adam_beta1 adam_epsilon beta1", "AdamW's first beta is 0.9 and its epsilon 1e-8: leave it out"),
    ("beta2 betas", "--adam_beta2 is AdamW's second beta; the first is 0.9"),
    ("attention_dropout attention_probs_dropout_prob attn_pdrop", "--attn_dropout is dropout on attention's weights"),
    ("embedding_dropout embd_pdrop embedding_dropout_prob", "--embed_dropout is dropout on the embeddings"),
    ("data_seed random_seed", "--seed is the seed"),
    ("neftune_noise_alpha label_smoothing_factor label_smoothing", "there is nothing of the kind here: leave it out"),
    # precision and memory
    ("load_in_4bit load_4bit bits quantization quantization_bit quantization_method quantize quant_method "
     "double_quant quant_4bit_type quant_4bit_double bnb_4bit_quant_type bnb_4bit_use_double_quant "
     "bnb_4bit_compute_dtype use_4bit",
     "--quant keeps the base in 4 bits, in the format of --quant_type (nf4, double-quantized)"),
    ("quant_lora_4bit quant_4bit llm_int8_skip_modules bnb_4bit_skip_modules",
     "--quant_targets says which linears --quant packs: frozen (without LoRA), lora, or by name"),
    ("max_memory_MB max_memory_mb max_memory_per_gpu gpu_memory_limit",
     "--max_memory is the most that the plan may take on a device, such as 24GB"),
    ("load_in_8bit load_8bit", "--quant --quant_type int8 keeps the base in 8 bits"),
    ("bf16 fp16 fp32 tf32 dtype torch_dtype half mixed_precision compute_dtype pure_bf16",
     "--precision takes bf16, fp16, fp32 or tf32"),
    ("bf16 fp16 fp32 precision torch_dtype half mixed_precision compute_dtype", "--dtype takes bf16, fp16 or fp32"),
    ("gradient_checkpointing use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing "
     "recompute",
     "--checkpointing recomputes layers in the backward"),
    ("activation_offloading enable_activation_offloading",
     "--offload_inputs moves what recomputed layers keep to host memory"),
    ("torch_compile", "--compile compiles what no kernel does"),
    ("flash_attn flash_attention attn_implementation attn_impl sdp_attention xformers xformers_attention "
     "use_flash_attention",
     "the kernel is chosen by itself: leave it out"),
    # processes
    ("deepspeed fsdp fsdp_config sharding_strategy ddp zero_stage",
     "--data_parallel takes sdp (ZeRO-2) or fsdp (ZeRO-3)"),
    ("tensor_parallel_size tensor_parallel tp_size tp_degree mp_size",
     "--model_parallel_size cuts the model over ranks"),
    ("master_port master_addr",
     "--n_gpus or --gpu_ids start the processes, which find a free port of this machine: leave it out"),
    ("n_gpus num_gpus gpus gpu_ids devices num_processes nproc_per_node nnodes master_port master_addr local_rank",
     "torchrun starts the processes: torchrun --nproc-per-node=N, with its other flags, before the script"),
    ("device_map no_cuda use_cpu cuda accelerator", "--device takes auto, cpu or cuda"),
    ("dataloader_num_workers preprocessing_num_workers dataset_processes dataset_num_proc num_proc",
     "--num_workers is the number of threads that tokenize and read images"),
    ("dataset_prepared_path overwrite_cache preprocessed_path", "--cache_ann_on_disk keeps tokenized data"),
    # images
    ("image_folder image_dir media_dir images_dir",
     "the directory of images is root of an entry in the YAML of --data_config"),
    ("image_aspect_ratio image_resize_algorithm image_max_pixels image_size",
     "--image_transform says how an image becomes the square that the encoder sees"),
    ("vision_tower mm_vision_tower vision_model", "--vision_path takes a directory of BLIP-2 or CLIP"),
    ("freeze_vision_tower unfreeze_mm_vision_tower", "image encoders are always frozen: leave it out"),
    ("tune_mm_mlp_adapter freeze_mm_mlp_adapter freeze_multi_modal_projector",
     'what stands behind an image encoder is trained by "vision_tuning": true in a JSON file of --llama_config'),
    # saving, logs, evaluation
    ("out_dir save_dir output output_directory", "--output_dir is where a run writes"),
    ("overwrite_output_dir", "--overwrite lets a run begin in a directory that holds another's checkpoints"),
    ("save_freq save_strategy checkpoint_interval saves_per_epoch checkpoint_every",
     "--save_steps, --save_minutes and --save_interval say when to save"),
    ("save_total_limit max_checkpoints", "--keep_last is how many of the newest checkpoints stay"),
    ("resume_from_checkpoint resume_checkpoint auto_resume auto_resume_from_checkpoints no_auto_resume",
     "--resume latest goes on from the newest whole checkpoint"),
    ("logging_steps logging_strategy logging_first_step log_every_n_steps log_interval log_freq",
     "every step is logged: leave it out"),
    ("logging_dir log_dir use_wandb wandb_project wandb_entity wandb_name wandb_run_name run_name use_tensorboard "
     "plot_loss logger_name",
     "--report_to takes tensorboard and wandb, whose project and name are the variables WANDB_PROJECT and WANDB_NAME"),
    ("do_eval eval_strategy evaluation_strategy evals_per_epoch eval_interval val_interval",
     "--eval_steps or --eval_epochs says how often to evaluate"),
    ("val_set_size val_size val_split_fraction test_size eval_dataset_size max_eval_samples",
     "--val_split is the share of the data that is held out to evaluate on"),
    ("test_datasets val_datasources eval_dataset val_dataset val_file validation_file",
     "--val_data names what to evaluate on"),
    ("eval_batch_size per_device_eval_batch_size val_batch_size",
     "documents that are evaluated are packed as in training: leave it out"),
    ("load_best_model_at_end metric_for_best_model",
     "best in --output_dir is the checkpoint with the lowest validation loss"),
    ("early_stopping_patience", "--patience ends the run after so many evaluations without a lower loss"),
    ("sample_generate", "--sample_prompts are answered at each evaluation"),
    ("do_predict predict_with_generate",
     "a trained model's answers to a data file are written by tools/predict.py: leave it out"),
    ("max_new_tokens", "--sample_tokens is the longest answer to one of --sample_prompts, in tokens"),
    ("do_sample num_beams temperature top_p top_k repetition_penalty",
     "answers to --sample_prompts are the likeliest tokens: leave it out"),
    ("min_new_tokens num_beam_groups penalty_alpha typical_p diversity_penalty length_penalty no_repeat_ngram_size",
     "there is nothing of the kind here: leave it out"),
    ("do_mmlu_eval mmlu_dataset mmlu_split", "--mmlu FILE is asked at each evaluation"),
    ("mmlu_source_max_len", "2048 tokens of a question of --mmlu are read: leave it out"),
    ("resid_dropout hidden_dropout resid_pdrop",
     "there is --embed_dropout and --attn_dropout, and none on residuals: leave it out"),
    ("do_train cache_dir load_from_local generation_config full_pad eval_sample_packing stage "
     "remove_unused_columns ddp_find_unused_parameters seq2seq use_cache ddp_timeout "
     "strict tokenizer_type",
     "there is no such choice here: leave it out"),
    ("trust_remote_code", "code that lies in a checkpoint is never run: leave it out"),
    ("use_auth use_auth_token hf_token token hub_model_id push_to_hub hf_hub_token",
     "nothing is fetched or pushed here: leave it out"),
    # asking
    ("max_new_tokens max_tokens max_length max_gen_toks", "--max_gen_len is the longest answer, in tokens"),
    ("additional_stop_symbols stop_strings stop_sequences stop_words", "--stop are texts that end an answer"),
    ("num_beams do_sample",
     "answers are sampled by --temperature (0: the likeliest token) and --top_p"),
    ("question query instruction text input", "--prompt takes the questions"),
    ("prompt_template template conv_mode chat_template prompt_type system", "--system_prompt lays out the question"),
    ("share server_name server_port listen", "the page is served at --host and --port"),
    ("auth", "the page's password is --password"),
)  # fmt: skip
_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
_TORCHRUN = "--nproc-per-node"


def unknown(name: str, candidates: Iterable[str], flags: Iterable[str] | None = None) -> str:
    """The end of an error's sentence about an unknown `name`: what to write instead, else the nearest of `candidates`.

    flags: those of the entry; sentences that name other flags are skipped. None: no sentence is skipped.
    """
    bare, known = name.lstrip("-").replace("-", "_"), {*(flags or ()), _TORCHRUN}
    for names, sentence in _SENTENCES:
        if bare in names.split() and (flags is None or known.issuperset(_FLAG.findall(sentence))):
            return f": {sentence}."
    return f".{nearest(name, candidates)}"
