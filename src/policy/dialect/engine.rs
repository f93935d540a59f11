//! Which engine a backend runs, as far as that decides where to ask how it is.
//!
//! Sources: the engines' own documentation of their health pages (vLLM, SGLang, llama.cpp and TGI: `/health`, 200 when
//! well, 503 while loading or when the engine behind the server is dead; Triton: KServe's `/v2/health/ready`, 400 when
//! not; Ollama has no health page, and `/api/version` is answered by the server alone). None of these pages proves that
//! a token would come: that is what a generated answer is for.

/// An engine with known pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp's server.
    LlamaCpp,
    /// Text Generation Inference.
    Tgi,
    /// Triton, or another server of KServe's protocol.
    Triton,
    /// Ollama.
    Ollama,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Vllm, Self::Sglang, Self::LlamaCpp, Self::Tgi, Self::Triton, Self::Ollama];

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::LlamaCpp => "llamacpp",
            Self::Tgi => "tgi",
            Self::Triton => "triton",
            Self::Ollama => "ollama",
        }
    }

    /// The page that answers 200 when it is well.
    pub const fn health_path(self) -> &'static str {
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp | Self::Tgi => "/health",
            Self::Triton => "/v2/health/ready",
            Self::Ollama => "/api/version",
        }
    }

    /// Where it is asked for a token. `{model}` stands for the model's name.
    pub const fn generate_path(self) -> &'static str {
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp => "/v1/chat/completions",
            // Needs no chat template, which many models there have not.
            Self::Tgi => "/generate",
            Self::Triton => "/v2/models/{model}/generate",
            Self::Ollama => "/api/generate",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_named_and_asked_as_documented() {
        for (name, health, generate) in [
            ("vllm", "/health", "/v1/chat/completions"),
            ("sglang", "/health", "/v1/chat/completions"),
            ("llamacpp", "/health", "/v1/chat/completions"),
            ("tgi", "/health", "/generate"),
            ("triton", "/v2/health/ready", "/v2/models/{model}/generate"),
            ("ollama", "/api/version", "/api/generate"),
        ] {
            let engine = Engine::ALL.into_iter().find(|engine| engine.name() == name).unwrap();
            assert_eq!((engine.health_path(), engine.generate_path()), (health, generate), "{name}");
        }
    }
}
