//! Writes pairs of small bundles with the same random weights: of flavour `cuda`, and of flavour `plain` as the reference.
//!
//! `gpu-bundles CONFIGS OUT` reads the recipes in `CONFIGS` and writes `OUT/NAME-cuda_*` and `OUT/NAME-plain`. The policies `pi0` and `pi05` have the sizes of the published heads,
//! images, prompts and chunks, on which the choice of kernels depends, with few layers and narrow tokens.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use integration_tests::ring::program;
use policy::{
    bundle::write_weights,
    config::RunConfig,
    noise::{Purpose, fill_normal, stream},
    params::{ParamSpec, params},
    plan::RunPlan,
    weights::{Weights, WeightsError},
};

/// Sizes of all policies here.
const SIZES: [&str; 14] = [
    "actor.model.vocab=1000",
    "actor.model.vlm={ width = 256, mlp = 512 }",
    "actor.model.expert={ width = 128, mlp = 256 }",
    "actor.model.depth=3",
    "actor.model.heads=8",
    "actor.model.kv_heads=1",
    "actor.model.head_dim=256",
    "actor.model.vision={ width = 144, mlp = 288, depth = 2, heads = 2, image_size = 224, patch = 14 }",
    "actor.model.action_horizon=50",
    "actor.model.action_dim=32",
    "actor.model.num_action_chunks=10",
    "actor.model.num_steps=4",
    "rollout.weights=\"inputs\"",
    "rollout.max_batch=8",
];

/// Weights whose products keep the size of their inputs, as trained ones do; norms near 1.
#[derive(Debug)]
struct Scaled(Vec<ParamSpec>);

impl Weights for Scaled {
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError> {
        let number = self.0.iter().position(|known| known == spec);
        let number = number.ok_or_else(|| WeightsError::Missing(spec.name.clone()))? as u64;
        let mut values = vec![0.0; spec.shape.iter().product()];
        fill_normal(&mut stream(Purpose::Init, 1, number, 0, 0), &mut values);
        let inputs: usize = spec.shape.iter().skip(1).product();
        let vision_norm = spec.name.contains("layer_norm") || spec.name.contains("post_layernorm");
        let (scale, offset) = if vision_norm && spec.name.ends_with("weight") {
            (0.1, 1.0)
        } else if spec.shape.len() == 1 {
            (0.1, 0.0)
        } else {
            (1.0 / (inputs as f32).sqrt(), 0.0)
        };
        for value in &mut values {
            *value = *value * scale + offset;
        }
        Ok(Cow::Owned(values))
    }
}

fn export(config: &Path, checkpoint: &Path, out: &Path, more: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new(program("export"));
    command
        .args(["onnx", "--config"])
        .arg(config)
        .arg("--checkpoint")
        .arg(checkpoint);
    command.arg("--out").arg(out).args(more);
    let status = command.status().context("starting `export`")?;
    ensure!(status.success(), "`export onnx` ended with {status}");
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let usage = "usage: gpu-bundles CONFIGS OUT";
    let mut folders = std::env::args_os().skip(1).map(PathBuf::from);
    let (configs, out) = (folders.next().context(usage)?, folders.next().context(usage)?);
    fs::create_dir_all(&out).with_context(|| format!("making `{}`", out.display()))?;
    let base = configs.join("quickstart.toml");
    for (name, variant, prompt) in [("pi0", "pi0", 48), ("pi05", "pi05", 200)] {
        let own = [
            format!("actor.model.variant={variant:?}"),
            format!("actor.model.prompt_len={prompt}"),
            // pi0's critic reads the state apart, pi0.5's does not
            format!("actor.model.value_head.state={}", variant == "pi0"),
            "actor.model.cameras=[\"base\", \"left\", \"right\"]".to_owned(),
        ];
        let all: Vec<String> = SIZES.iter().map(|s| (*s).to_owned()).chain(own).collect();
        let plan = RunPlan::new(RunConfig::load(&base, &all)?)?;
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("config.toml");
        fs::write(&config, plan.config.to_toml()?)?;
        let specs = params(&plan.dims, &plan.heads);
        let checkpoint = folder.path().join("random.safetensors");
        write_weights(&checkpoint, &specs, &Scaled(specs.clone()))?;
        let cuda = ["--set", "rollout.provider=\"cuda\""];
        let bf16 = ["--set", "rollout.precision=\"bf16\""];
        let path = |end: &str| out.join(format!("{name}{end}"));
        export(&config, &checkpoint, &path("-plain"), &[])?;
        export(
            &config,
            &checkpoint,
            &path("-cuda_bf16"),
            &[&cuda[..], &bf16, &["--batch", "1"]].concat(),
        )?;
        export(
            &config,
            &checkpoint,
            &path("-cuda_bf16_b8"),
            &[&cuda[..], &bf16, &["--batch", "8"]].concat(),
        )?;
        export(
            &config,
            &checkpoint,
            &path("-cuda_f32"),
            &[&cuda[..], &["--batch", "1"]].concat(),
        )?;
    }
    Ok(())
}
