//! Weights in one `model.safetensors`, or in shards that `model.safetensors.index.json` lists.

use super::fp8::{SCALE, Scales, to_bf16};
use crate::error::{ModelError, printable};
use crate::json::Object;
use crate::safetensors::SafetensorsFile;
use crate::weights::{Fp8Matrix, RowOrder, Tensor, TensorInfo, WeightSource, spread};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use tandem_kernels::DType;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Room for a hundred thousand tensors.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// The largest models have a few hundred shards.
const MAX_SHARDS: usize = 4096;

/// All tensors of a folder, by name.
#[derive(Debug)]
struct SafetensorsWeights {
    shards: Vec<SafetensorsFile>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    shard_idx: usize,
    /// As it is handed out.
    info: TensorInfo,
    /// Of a matrix that lies there in e4m3.
    scales: Option<Scales>,
}

/// Opens the single file if there is one, else the shards.
pub(crate) fn open(folder: &Path) -> Result<Box<dyn WeightSource>, ModelError> {
    let single = folder.join(SINGLE);
    let mut weights = SafetensorsWeights { shards: Vec::new(), tensors: BTreeMap::new() };
    if single.is_file() {
        weights.add(SafetensorsFile::open(&single)?)?;
        weights.find_scales()?;
        return Ok(Box::new(weights));
    }
    let index = Object::read(&folder.join(INDEX), MAX_INDEX_BYTES)?;
    let weight_map = weight_map(&index)?;
    let mut shard_names: Vec<&str> = weight_map.values().map(String::as_str).collect();
    shard_names.sort_unstable();
    shard_names.dedup();
    if shard_names.len() > MAX_SHARDS {
        return Err(index.refuse("weight_map", format!("more than {MAX_SHARDS} shards")));
    }
    for shard_name in shard_names {
        let path = shard_path(&index, folder, shard_name)?;
        let shard = SafetensorsFile::open(&path)?;
        check_listed(&weight_map, shard_name, &shard)?;
        weights.add(shard)?;
    }
    match weight_map.keys().find(|name| !weights.tensors.contains_key(*name)) {
        Some(name) => Err(ModelError::tensor(&index.file, name, "is not in the shard that the index names")),
        None => {
            weights.find_scales()?;
            Ok(Box::new(weights))
        }
    }
}

impl SafetensorsWeights {
    fn add(&mut self, shard: SafetensorsFile) -> Result<(), ModelError> {
        for name in shard.names() {
            let Some(stored) = shard.get(name) else { continue };
            let refuse = |reason: String| Err(ModelError::tensor(shard.file(), name, reason));
            let dtype = match stored.dtype {
                "F32" => DType::F32,
                "F16" => DType::F16,
                "BF16" => DType::Bf16,
                // It becomes that when it is asked for.
                "F8_E4M3" => DType::Bf16,
                other => return refuse(format!("type {other} is not supported")),
            };
            let info = TensorInfo { dtype, shape: stored.shape.to_vec(), row_order: RowOrder::Natural };
            let place = Place { shard_idx: self.shards.len(), info, scales: None };
            if self.tensors.insert(name.to_owned(), place).is_some() {
                return refuse("is in two shards".into());
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    /// Gives matrices in e4m3 their scales, and takes these away: nobody else asks for them.
    fn find_scales(&mut self) -> Result<(), ModelError> {
        let stored = |weights: &Self, name: &str| {
            let place = weights.tensors.get(name)?;
            weights.shards[place.shard_idx].get(name).map(|stored| stored.dtype == "F8_E4M3")
        };
        let names: Vec<String> =
            self.tensors.keys().filter(|name| stored(self, name) == Some(true)).cloned().collect();
        for name in &names {
            let scale_name = format!("{name}{SCALE}");
            let refuse = |reason: String| ModelError::tensor("safetensors", name, reason);
            let scale = self.tensor(&scale_name).map_err(|_| refuse("is F8_E4M3 and has no scale".into()))?;
            let values =
                scale.to_f32_values().ok_or_else(|| refuse("has a scale of no type of floats".into()))?;
            let shape = &self.tensors[name].info.shape;
            let scales = Scales::new(shape, values, &scale.shape).map_err(refuse)?;
            self.tensors.get_mut(name).expect("it was just found").scales = Some(scales);
        }
        if !names.is_empty() {
            self.tensors.retain(|name, _| !name.ends_with(SCALE));
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(&TensorInfo, &[u8]), ModelError> {
        let place = self.tensors.get(name);
        let found = place.and_then(|place| Some((&place.info, self.shards[place.shard_idx].get(name)?.data)));
        found.ok_or_else(|| ModelError::tensor("safetensors", name, "is missing"))
    }
}

impl WeightSource for SafetensorsWeights {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|place| &place.info)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let (info, data) = self.find(name)?;
        let scales = self.tensors.get(name).and_then(|place| place.scales.as_ref());
        let data = match scales {
            Some(scales) => Cow::Owned(to_bf16(data, info.shape.last().copied().unwrap_or(1), scales)),
            None => Cow::Borrowed(data),
        };
        Ok(Tensor { dtype: info.dtype, shape: info.shape.clone(), data, row_order: info.row_order })
    }

    fn fp8(&self, name: &str) -> Option<Fp8Matrix<'_>> {
        let scales = self.tensors.get(name)?.scales.as_ref()?.as_slice();
        let (info, codes) = self.find(name).ok()?;
        let &[_, cols] = &info.shape[..] else { return None };
        Some(Fp8Matrix { codes, cols, scales })
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn sample(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let (_, data) = self.find(name)?;
        let mut sample = spread(data);
        if let Some(scales) = &self.tensors[name].scales {
            sample.extend(scales.sample());
        }
        Ok(sample)
    }
}

fn weight_map(index: &Object) -> Result<BTreeMap<String, String>, ModelError> {
    let map = index.object("weight_map")?.ok_or_else(|| index.refuse("weight_map", "is missing"))?;
    let mut weight_map = BTreeMap::new();
    for (name, shard) in map.iter() {
        let shard = shard.as_str().ok_or_else(|| map.refuse(name, "is not a file name"))?;
        weight_map.insert(name.clone(), shard.to_owned());
    }
    Ok(weight_map)
}

fn check_listed(
    weight_map: &BTreeMap<String, String>,
    shard_name: &str,
    shard: &SafetensorsFile,
) -> Result<(), ModelError> {
    let listed = |name: &&str| weight_map.get(*name).is_some_and(|listed| listed == shard_name);
    match shard.names().find(|name| !listed(name)) {
        Some(name) => Err(ModelError::tensor(shard.file(), name, "is not listed in the index")),
        None => Ok(()),
    }
}

/// A shard's name must be a plain file name of this folder, and no link out of it. One way out is allowed: a
/// snapshot of the hub's cache links into the `blobs` of the same repository.
fn shard_path(index: &Object, folder: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let refuse = |reason: &str| {
        ModelError::field(&index.file, "weight_map", format!("shard {}: {reason}", printable(name)))
    };
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    if !plain || name.contains(['/', '\\', '\0']) {
        return Err(refuse("not a plain file name"));
    }
    let path = folder.join(name);
    let real = std::fs::canonicalize(&path).map_err(|source| ModelError::io(&path, source))?;
    let home = std::fs::canonicalize(folder).map_err(|source| ModelError::io(folder, source))?;
    if real.starts_with(&home) || hub_blobs(&home).is_some_and(|blobs| real.starts_with(blobs)) {
        // The path without links: what was checked is what is opened.
        return Ok(real);
    }
    Err(refuse("a link out of the folder"))
}

/// `<repository>/blobs` for a folder `<repository>/snapshots/<revision>`.
fn hub_blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent()?;
    (snapshots.file_name()? == "snapshots").then(|| Some(snapshots.parent()?.join("blobs")))?
}

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
