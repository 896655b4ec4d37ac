//! Parts of the losses.

use learner::{
    advantage::normalize,
    loss::{ExplainedVariance, aggregate_logprob, episode_weighted_mean, huber, k3, masked_mean},
    ranks::OneRank,
};
use policy::config::LogprobType;

use super::{floats, run};

#[test]
fn loss_helpers_agree_with_the_reference() {
    run(
        "rlinf_helpers",
        // other estimators of the penalty, means over the tokens of a language model's answers
        &["kl_penalty", "seq_mean_token_mean", "seq_mean_token_sum"],
        |case, coverage| match case.spec["fn"].as_str().unwrap() {
            "huber_loss" => {
                let error = case.input("error");
                case.close_array(
                    "out.out",
                    &floats(&huber(&error, &error.zeros_like(), case.need("delta"))),
                );
            }
            "masked_mean" => {
                let (values, mask) = (case.input("values"), case.maybe_input("mask"));
                let ours = masked_mean(&values, mask.as_ref()).double_value(&[]);
                let elements = mask
                    .as_ref()
                    .map_or(1.0, |mask| values.numel() as f64 / mask.numel() as f64);
                case.close("recorded", case.scalar("out.out"), ours * elements);
                if elements > 1.0 {
                    let recorded = case.scalar("out.out");
                    coverage.differs(case, &format!("a mask entry spread over {elements} elements counts once in the reference: {recorded:.5}, ours {ours:.5}"));
                }
            }
            "masked_mean_ratio" => {
                // the reference reads the length over the longest length
                let (values, mask) = (case.input("values"), case.input("mask"));
                let longest = 1e6;
                let lengths = case.input("loss_mask_ratio") * longest;
                let ours = episode_weighted_mean(&values, &mask, &lengths, longest);
                case.close("recorded", ours.double_value(&[]), case.scalar("out.out"));
            }
            "reshape_entropy" => {
                let entropy = case.input("entropy");
                let (rows, action_dim) = (case.need("batch_size") as i64, case.need("action_dim") as i64);
                let level = match case.text("entropy_type") {
                    "action_level" => LogprobType::ActionLevel,
                    "chunk_level" => LogprobType::ChunkLevel,
                    _ => LogprobType::TokenLevel,
                };
                let ours = aggregate_logprob(&entropy.reshape([rows, -1, action_dim]), level).unwrap();
                case.close_array("out.out", &floats(&ours));
            }
            "safe_normalize" => {
                let mut values = case.array("in.array").f32();
                normalize(&mut values, Some(&case.array("in.loss_mask").bool()), &OneRank).unwrap();
                case.close_array("out.out", &values);
            }
            "compute_critic_explained_variance_from_stats" => {
                let stat = |name: &str| case.scalar(&format!("in.__sum__/_critic_explained_variance/{name}"));
                let sums = ExplainedVariance {
                    count: stat("count"),
                    returns_sum: stat("returns_sum"),
                    returns_sq_sum: stat("returns_sq_sum"),
                    errors_sum: stat("errors_sum"),
                    errors_sq_sum: stat("errors_sq_sum"),
                };
                case.close("explained variance", sums.value().unwrap(), case.scalar("out.out"));
            }
            "kl_penalty" if matches!(case.text("kl_penalty"), "k3" | "low_var_kl") => {
                // the reference reads reference and current policy, ours the log-ratio
                let ours = floats(&k3(&(case.input("ref_logprob") - case.input("logprob"))));
                let recorded = case.array("out.out").data;
                for (got, want) in ours.iter().zip(&recorded) {
                    if *want < 10.0 {
                        case.close("k3", f64::from(*got), *want);
                    } else {
                        assert!(*got >= 10.0, "{}: {got}", case.id);
                    }
                }
                let largest = ours.iter().copied().fold(0.0f32, f32::max);
                if largest > 10.0 {
                    coverage.differs(
                        case,
                        &format!("the reference clamps at 10 and has no gradient there, ours reaches {largest:.1}"),
                    );
                }
            }
            name @ ("kl_penalty" | "seq_mean_token_sum" | "seq_mean_token_mean") => {
                coverage.not_offered(case, name);
            }
            other => panic!("unknown function {other}"),
        },
    );
}
