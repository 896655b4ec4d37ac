//! Data sets on disk as tensors: demonstrations and scenes in safetensors files (layout at the env workers that write them).

use std::path::Path;

use policy::{
    config::ModelConfig,
    dims::PolicyDims,
    norm::{NormStats, bool_mask},
    prompt::{PromptTokens, Tokenizer},
};
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::{
    batch::observation::ObservationBatch,
    error::{LearnerError, Result},
};

/// A data set in memory.
#[derive(Debug)]
pub struct Dataset {
    /// Observations in model units.
    pub observations: ObservationBatch,
    /// Demonstrations: normalised actions, f32 `[N, action_horizon, action_dim]`. Scenes: key points `[N, P, 2]` in `[0, 1]`.
    pub targets: Tensor,
}

/// Largest data set that is read.
const MAX_BYTES: u64 = 32 << 30;

/// Reads `images`, `state`, `prompt_id` and the named targets (`actions` or `keypoints`).
///
/// # Errors
/// The file is missing, no safetensors, or its arrays do not fit the policy.
pub fn read(
    path: &Path,
    targets: &str,
    dims: &PolicyDims,
    model: &ModelConfig,
    stats: Option<&NormStats>,
) -> Result<Dataset> {
    let bad = |detail: String| LearnerError::Dataset {
        path: path.to_owned(),
        detail,
    };
    let size = std::fs::metadata(path)
        .map_err(crate::error::io("opening the data set", path))?
        .len();
    if size > MAX_BYTES {
        return Err(bad(format!("{size} bytes, at most {MAX_BYTES} are read")));
    }
    let bytes = std::fs::read(path).map_err(crate::error::io("reading the data set", path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("no whole safetensors file: {e}")))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let meta: serde_json::Value = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("meta"))
        .and_then(|text| serde_json::from_str(text).ok())
        .ok_or_else(|| bad("metadata key `meta` with the prompts is missing".to_owned()))?;
    let prompts: Vec<String> = meta
        .get("prompts")
        .and_then(|p| serde_json::from_value(p.clone()).ok())
        .ok_or_else(|| bad("`meta.prompts` is no list of strings".to_owned()))?;

    let array = |name: &str, dtype: Dtype| -> Result<(Vec<i64>, Tensor)> {
        let view = file
            .tensor(name)
            .map_err(|_e| bad(format!("tensor `{name}` is missing")))?;
        if view.dtype() != dtype {
            return Err(bad(format!(
                "tensor `{name}` has type {:?}, expected {dtype:?}",
                view.dtype()
            )));
        }
        let shape: Vec<i64> = view.shape().iter().map(|s| *s as i64).collect();
        let kind = match dtype {
            Dtype::U8 => Kind::Uint8,
            Dtype::I64 => Kind::Int64,
            _ => Kind::Float,
        };
        Ok((shape.clone(), Tensor::from_data_size(view.data(), &shape, kind)))
    };
    let (images_shape, images) = array("images", Dtype::U8)?;
    let (state_shape, state) = array("state", Dtype::F32)?;
    let (prompt_shape, prompt_id) = array("prompt_id", Dtype::I64)?;
    let (target_shape, target) = array(targets, Dtype::F32)?;
    let n = prompt_shape.first().copied().unwrap_or(0);
    let side = dims.vision.image_size as i64;
    if n == 0 || images_shape != [n, dims.cameras as i64, side, side, 3] {
        return Err(bad(format!(
            "`images` is {images_shape:?}, expected [{n}, {}, {side}, {side}, 3]",
            dims.cameras
        )));
    }
    if state_shape.len() != 2 || state_shape[0] != n || state_shape[1] > dims.action_dim as i64 {
        return Err(bad(format!(
            "`state` is {state_shape:?}, expected [{n}, at most {}]",
            dims.action_dim
        )));
    }
    if target_shape.first() != Some(&n) || target_shape.len() != 3 {
        return Err(bad(format!("`{targets}` is {target_shape:?}, expected [{n}, _, _]")));
    }

    if prompt_id.min().int64_value(&[]) < 0 || prompt_id.max().int64_value(&[]) >= prompts.len() as i64 {
        return Err(bad(format!("`prompt_id` lies outside 0..{}", prompts.len())));
    }

    let normalise = |values: &Tensor, which: fn(&NormStats) -> &policy::norm::DimStats| -> Result<Tensor> {
        let Some(stats) = stats else {
            return Ok(values.shallow_clone());
        };
        let width = values.size().last().copied().unwrap_or(1) as usize;
        let mut data = vec![0.0f32; values.numel()];
        let len = data.len();
        values.copy_data(&mut data, len);
        let rows: Vec<f32> = data
            .chunks(width)
            .map(|row| {
                model
                    .normalization
                    .normalize(which(stats), row)
                    .map_err(|e| bad(e.to_string()))
            })
            .collect::<Result<Vec<_>>>()?
            .concat();
        Ok(Tensor::from_slice(&rows).view_as(values))
    };
    let pad = |values: Tensor| {
        let missing = dims.action_dim as i64 - values.size().last().copied().unwrap_or(0);
        values.constant_pad_nd([0, missing.max(0)])
    };
    let raw_state = state.shallow_clone();
    let state = normalise(&state, |s| &s.state)?;
    let tokenizer = Tokenizer::from_config(&model.tokenizer, None)?;
    let (prompt, prompt_mask) = tokenized(model, &tokenizer, &prompts, &prompt_id, &state)?;
    let state = pad(state);
    let target = if targets == "actions" {
        if target_shape[1] != dims.action_horizon as i64 || target_shape[2] > dims.action_dim as i64 {
            return Err(bad(format!(
                "`actions` is {target_shape:?}, expected [{n}, {}, at most {}]",
                dims.action_horizon, dims.action_dim
            )));
        }
        let target = match &model.delta_actions {
            Some(runs) => differences(&target, &raw_state, &bool_mask(runs)).map_err(bad)?,
            None => target,
        };
        pad(normalise(&target, |s| &s.actions)?)
    } else {
        target
    };
    let image_mask = Tensor::ones([n, dims.cameras as i64], (Kind::Bool, tch::Device::Cpu));
    let observations = ObservationBatch {
        images,
        image_mask,
        prompt,
        prompt_mask,
        state,
    };
    Ok(Dataset {
        observations,
        targets: target,
    })
}

/// Prompt ids and masks, `[N, prompt_len]`. `state` is normalised, not padded; only a prompt that holds it reads it.
fn tokenized(
    model: &ModelConfig,
    tokenizer: &Tokenizer,
    prompts: &[String],
    prompt_id: &Tensor,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let length = model.prompt_len;
    let (mut ids, mut masks) = (Vec::new(), Vec::new());
    let mut add = |tokens: PromptTokens| {
        ids.extend(tokens.ids);
        masks.extend(tokens.mask);
    };
    if !model.discrete_state_input {
        // prompts are few: tokenize each once, then pick rows
        for prompt in prompts {
            add(tokenizer.tokenize(prompt, length)?);
        }
        let table = |flat: Tensor| flat.view([-1, length as i64]).index_select(0, prompt_id);
        return Ok((table(Tensor::from_slice(&ids)), table(Tensor::from_slice(&masks))));
    }
    let rows = prompt_id.size().first().copied().unwrap_or(0);
    for row in 0..rows {
        let own = |t: &Tensor| t.get(row);
        let mut numbers = vec![0.0f32; own(state).numel()];
        let len = numbers.len();
        own(state).copy_data(&mut numbers, len);
        // the ids were checked against the list of prompts
        let prompt = prompts
            .get(own(prompt_id).int64_value(&[]) as usize)
            .map_or("", String::as_str);
        add(tokenizer.tokenize_with_state(prompt, &numbers, length)?);
    }
    let table = |flat: Tensor| flat.view([-1, length as i64]);
    Ok((table(Tensor::from_slice(&ids)), table(Tensor::from_slice(&masks))))
}

/// Actions `[N, H, A]` as differences from the state `[N, D]` of their observation where the mask says so; both raw.
fn differences(actions: &Tensor, state: &Tensor, mask: &[bool]) -> std::result::Result<Tensor, String> {
    let width = |values: &Tensor| values.size().last().copied().unwrap_or(0);
    let dims = mask.len() as i64;
    if dims > width(actions) || dims > width(state) {
        return Err(format!(
            "`actor.model.delta_actions` covers {dims} dimensions, the data has {} of the actions and {} of the state",
            width(actions),
            width(state)
        ));
    }
    let shift = state.narrow(-1, 0, dims) * Tensor::from_slice(mask).to_kind(Kind::Float);
    Ok(actions - shift.constant_pad_nd([0, width(actions) - dims]).unsqueeze(1))
}

#[cfg(test)]
mod tests {
    use policy::norm::delta_from_absolute;

    use super::*;

    #[test]
    fn a_prompt_with_the_state_is_tokenized_for_every_row() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
        let mut model = policy::config::RunConfig::load(&path, &[])
            .expect("configuration")
            .actor
            .model;
        let words = [
            "pick", "red", "Task", ":", ",", "State", ";", "Action", "0", "128", "255",
        ]
        .map(str::to_owned);
        let tokenizer = Tokenizer::from_words(&words).expect("words");
        model.prompt_len = 16;
        let prompts = ["pick".to_owned(), "pick red".to_owned()];
        let (prompt_id, state) = (
            Tensor::from_slice(&[1i64, 0, 1]),
            Tensor::from_slice(&[-1.0f32, 0.0, 1.0]).view([3, 1]),
        );
        for discrete in [true, false] {
            model.discrete_state_input = discrete;
            let (ids, mask) = tokenized(&model, &tokenizer, &prompts, &prompt_id, &state).expect("prompts");
            assert_eq!((ids.size(), mask.kind()), (vec![3, 16], Kind::Bool));
            for (row, (prompt, state)) in [("pick red", -1.0f32), ("pick", 0.0), ("pick red", 1.0)]
                .into_iter()
                .enumerate()
            {
                let want = if discrete {
                    tokenizer.tokenize_with_state(prompt, &[state], 16)
                } else {
                    tokenizer.tokenize(prompt, 16)
                };
                let got: Vec<i64> = Vec::try_from(ids.get(row as i64)).expect("ids");
                assert_eq!(got, want.expect("words").ids, "row {row}");
            }
        }
    }

    #[test]
    fn actions_become_differences_as_openpi_makes_them() {
        let mask = bool_mask(&[2, -1]);
        let actions = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view([1, 2, 4]);
        let state = Tensor::from_slice(&[0.5f32, -1.0, 9.0]).view([1, 3]);
        let got: Vec<f32> =
            Vec::try_from(differences(&actions, &state, &mask).expect("fits").flatten(0, -1)).expect("f32");
        let rows = [[1.0f32, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]];
        let expected = rows.map(|row| delta_from_absolute(&row, &[0.5f32, -1.0, 9.0], &mask).expect("fits"));
        assert_eq!(got, expected.concat());
        assert_eq!(got, [0.5, 3.0, 3.0, 4.0, 4.5, 7.0, 7.0, 8.0]);

        let narrow = differences(&actions, &state.narrow(-1, 0, 2), &mask).expect_err("too narrow a state");
        assert!(
            narrow.contains("3 dimensions") && narrow.contains("2 of the state"),
            "{narrow}"
        );
    }
}
