//! Floating-point operations of a policy's passes, counted from its sizes, to compare the cost of a prefix and of an expert pass.
//!
//! A multiplication with its addition counts as two operations. Matrix products are counted, element-wise operations are not.

use crate::dims::{PolicyDims, StackDims, Variant};

/// Returns the operations of a linear layer on `tokens` tokens.
fn linear(tokens: usize, inputs: usize, outputs: usize) -> u64 {
    2 * tokens as u64 * inputs as u64 * outputs as u64
}

/// Returns the operations of scores and weighted sums of `queries` tokens over `keys` tokens; `width` is over all query heads.
fn attention(queries: usize, keys: usize, width: usize) -> u64 {
    4 * queries as u64 * keys as u64 * width as u64
}

impl PolicyDims {
    /// Returns the operations of the prefix of one observation: all cameras and the prompt through the vision-language stack.
    pub fn prefix_flops(&self) -> u64 {
        let vision = &self.vision;
        let tokens = vision.tokens();
        let block = linear(tokens, vision.width, 4 * vision.width)
            + linear(tokens, vision.width, 2 * vision.mlp)
            + attention(tokens, tokens, vision.width);
        let image = linear(tokens, 3 * vision.patch * vision.patch, vision.width)
            + vision.depth as u64 * block
            + linear(tokens, vision.width, self.vlm.width);
        let prefix = self.prefix_len();
        self.cameras as u64 * image + self.depth as u64 * self.layer_flops(self.vlm, prefix, prefix)
    }

    /// Returns the operations of one expert pass: the velocity of one chunk at one flow time, with a stored prefix.
    pub fn velocity_flops(&self) -> u64 {
        let (width, tokens) = (self.expert.width, self.suffix_len());
        let projections =
            linear(self.action_horizon, self.action_dim, width) + linear(self.action_horizon, width, self.action_dim);
        let time = match self.variant {
            Variant::Pi0 => {
                linear(1, self.action_dim, width)
                    + linear(1, width, width)
                    + 2 * linear(self.action_horizon, width, width)
            }
            // adaRMS: scale, shift and gate for the two norms of each layer and the final norm
            Variant::Pi05 => 2 * linear(1, width, width) + (2 * self.depth as u64 + 1) * linear(1, width, 3 * width),
        };
        projections + time + self.depth as u64 * self.layer_flops(self.expert, tokens, self.prefix_len() + tokens)
    }

    fn layer_flops(&self, stack: StackDims, tokens: usize, keys: usize) -> u64 {
        let (queries, own) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        linear(tokens, stack.width, 2 * queries + 2 * own)
            + linear(tokens, stack.width, 3 * stack.mlp)
            + attention(tokens, keys, queries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{EXPERT, Heads, VLM, params};

    /// Compares with the parameter table: except for attention, each weight is used once per token of its stack and pass.
    #[test]
    fn every_weight_meets_its_tokens_once() {
        for variant in [Variant::Pi0, Variant::Pi05] {
            let dims = PolicyDims::published(variant);
            let (patches, prefix, suffix) = (dims.cameras * 256, dims.prefix_len(), dims.suffix_len());
            let (mut of_prefix, mut of_velocity) = (0u64, 0u64);
            for spec in params(&dims, &Heads::default()) {
                let weights = spec.shape.iter().product::<usize>() as u64;
                let (name, matrix) = (spec.name.as_str(), spec.shape.len() > 1);
                if !matrix || name.contains("position_embedding") || name.contains("lm_head") {
                    continue;
                }
                let vision = name.contains("vision_tower") || name.contains("multi_modal_projector");
                match name {
                    _ if vision => of_prefix += 2 * weights * patches as u64,
                    _ if name.starts_with(VLM) => of_prefix += 2 * weights * prefix as u64,
                    _ if name.contains(".dense.") => of_velocity += 2 * weights,
                    _ if name.starts_with(EXPERT) => of_velocity += 2 * weights * suffix as u64,
                    // half of the columns read the flow time, which all tokens share
                    "action_time_mlp_in.weight" => of_velocity += weights * (1 + dims.action_horizon as u64),
                    _ if name.starts_with("action_") => of_velocity += 2 * weights * dims.action_horizon as u64,
                    _ => of_velocity += 2 * weights,
                }
            }
            let heads = dims.heads * dims.head_dim;
            let in_prefix = 3 * 27 * attention(256, 256, 1152) + 18 * attention(prefix, prefix, heads);
            assert_eq!(dims.prefix_flops() - in_prefix, of_prefix, "{variant:?}");
            let in_velocity = 18 * attention(suffix, prefix + suffix, heads);
            assert_eq!(dims.velocity_flops() - in_velocity, of_velocity, "{variant:?}");
        }
    }
}
