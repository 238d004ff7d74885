package org.dualtoken.demo

import android.content.res.AssetManager
import org.json.JSONObject

/** What a bundle's manifest says of pictures. The graph normalises: it is fed bytes. */
class Contract(json: String) {
    private val input = JSONObject(json).getJSONObject("input")
    val height = input.getJSONArray("size").getInt(0)
    val width = input.getJSONArray("size").getInt(1)
    val cropRatio = input.getDouble("crop_ratio")

    init {
        require(input.getString("kind") == "image") { "the bundle takes tensors; export it with --input image" }
        require(input.getString("resize") == "bicubic") { "the bundle stretches its pictures; this app crops them" }
        require(input.getString("color") == "RGB") { "the bundle takes other colours than RGB" }
    }
}

fun AssetManager.text(name: String): String = open(name).bufferedReader().use { it.readText() }
